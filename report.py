"""Writes a sweep's report again, from its results: report.md, report.html, the picture.

  python report.py --workdir=runs/sweep
  python report.py --workdir=runs/sweep --margin=0.01
  python report.py --workdir=results/frontier --reference=gqa --margin=0.02
  python report.py --workdir=runs/published --run=runs/smollm2 --run=runs/smollm2-c192

Nothing is trained. --run reads a run that the sweep did not train, an imported one say, and makes
it an arm of the report, or of a new one. Reference and margin are those of the last report, where
none are given.
"""

# ruff: noqa: E402
import math

from absl import flags

from configs import base
from mla import cli

WORKDIR = flags.DEFINE_string('workdir', None, "the sweep's folder")
RUNS = flags.DEFINE_multi_string(
  'run', [], 'a run that the sweep did not train, an arm of the report; again for each further one'
)
REFERENCE = flags.DEFINE_string('reference', '', 'the arm to compare with')
MARGIN = flags.DEFINE_float('margin', None, 'nats a token that the sweet spot may lose')

if __name__ == '__main__':
  cli.begin()

from mla import backends, evaluate, files, paths
from mla.errors import UserError
from mla.fields import flatten
from mla.sweep import frontier, joined, page, report


def main() -> None:
  if WORKDIR.value is None:
    raise UserError('--workdir: which sweep? e.g. --workdir=results/frontier')
  folder = paths.folder('workdir', WORKDIR.value)
  runs = [paths.folder('run', run) for run in RUNS.value]
  if not (folder / 'results.jsonl').exists() and not runs:
    raise UserError(f'--workdir={folder}: no sweep there (results.jsonl is missing); run one first')
  last = folder / 'frontier.json'
  kept = files.read_json(last, 'remove it') if last.exists() else {}
  reference = REFERENCE.value or kept.get('reference', '')
  margin = kept.get('margin', frontier.MARGIN) if MARGIN.value is None else MARGIN.value
  if not 0 <= margin < math.inf:
    raise UserError(f'--margin={margin}: must be 0 or positive, and finite')
  if runs:
    backends.prepare(evaluate.BATCH)
  for run in runs:
    line = joined.join(folder, run)
    print(f'{run}: loss {line["loss"]:.4f} over {line["tokens_evaluated"]:,} targets')
  print(report.write(folder, reference, margin))
  print(page.write(folder, flatten(base.get_config())))


if __name__ == '__main__':
  cli.run(main)
