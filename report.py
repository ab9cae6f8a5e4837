"""Writes a sweep's report again, from its results: report.md, report.html, the picture.

  python report.py --workdir=runs/sweep
  python report.py --workdir=runs/sweep --margin=0.01
  python report.py --workdir=results/frontier --reference=gqa --margin=0.02

Nothing is trained. Reference and margin are those of the last report, where none are given.
"""

# ruff: noqa: E402
import math

from absl import flags

from configs import base
from mla import cli

WORKDIR = flags.DEFINE_string('workdir', None, "the sweep's folder")
REFERENCE = flags.DEFINE_string('reference', '', 'the arm to compare with')
MARGIN = flags.DEFINE_float('margin', None, 'nats a token that the sweet spot may lose')

if __name__ == '__main__':
  cli.begin()

from mla import files, paths
from mla.errors import UserError
from mla.fields import flatten
from mla.sweep import frontier, page, report


def main() -> None:
  if WORKDIR.value is None:
    raise UserError('--workdir: which sweep? e.g. --workdir=results/frontier')
  folder = paths.folder('workdir', WORKDIR.value)
  if not (folder / 'results.jsonl').exists():
    raise UserError(f'--workdir={folder}: no sweep there (results.jsonl is missing); run one first')
  last = folder / 'frontier.json'
  kept = files.read_json(last, 'remove it') if last.exists() else {}
  reference = REFERENCE.value or kept.get('reference', '')
  margin = kept.get('margin', frontier.MARGIN) if MARGIN.value is None else MARGIN.value
  if not 0 <= margin < math.inf:
    raise UserError(f'--margin={margin}: must be 0 or positive, and finite')
  print(report.write(folder, reference, margin))
  print(page.write(folder, flatten(base.get_config())))


if __name__ == '__main__':
  cli.run(main)
