"""Evaluates runs: perplexity read through the KV cache, against the bytes of that cache.

python eval.py --workdir=A [--workdir=B ...] [--cache_dtype=bfloat16] [--json=F] [--plot=F.png]
"""

import json
from pathlib import Path

from absl import flags

from mla import backends, cli, evaluate, plots, report
from mla.errors import UserError

WORKDIRS = flags.DEFINE_multi_string('workdir', [], 'a run; give it again for each further one')
CACHE_DTYPE = flags.DEFINE_string('cache_dtype', 'bfloat16', 'float32, bfloat16 or int8')
JSON = flags.DEFINE_string('json', None, 'write the figures here')
PLOT = flags.DEFINE_string('plot', None, 'draw perplexity against bytes per token here (.png)')


def main() -> None:
  if not WORKDIRS.value:
    raise UserError('--workdir: which run? e.g. --workdir=runs/mla_small')
  cli.check_writable('json', JSON.value)
  cli.check_writable('plot', PLOT.value, endings=('.png', '.pdf', '.svg'))
  backends.prepare(evaluate.BATCH)
  runs = [
    evaluate.evaluate_run(Path(workdir), CACHE_DTYPE.value, say=print) for workdir in WORKDIRS.value
  ]
  print('\n' + report.table(runs))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps({'runs': runs}, indent=2) + '\n')
  if PLOT.value:
    plots.save(plots.perplexity, Path(PLOT.value), runs)


if __name__ == '__main__':
  cli.run(main)
