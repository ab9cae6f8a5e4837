"""Of a sweep over a probe (mla/probes.py): accuracy beside loss, over the same seeds.

Loss goes on deciding learning rates, frontier and sweet spot; accuracy is what a probe is read by.
Differences at equal bytes are of all pairs, for the best is found by looking, and share what the
report may err: a family by itself, beside those of mla/sweep/frontier.py.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mla.sweep import statistics as stats

SIZES = ('probe', 'records', 'attributes', 'alphabet', 'bits_held')

Lines = Sequence[Mapping[str, Any]]


def sizes(lines: Lines) -> dict[str, Any]:
  """What the probe of some lines is: one key of a summary, or none for text."""
  if 'probe' not in lines[0]:
    return {}
  return {'probe': {'task' if name == 'probe' else name: lines[0][name] for name in SIZES}}


def by_arm(arms: Mapping[str, Lines], level: float) -> dict[str, dict[str, Any]]:
  """{arm: {'recall': its accuracies}}, of each arm's lines that judge it; {} for text.

  `level` is what the differences at equal bytes may err, all at once.
  """
  if any('accuracy' not in line for lines in arms.values() for line in lines):
    return {}
  means = {arm: stats.estimate([line['accuracy'] for line in lines]) for arm, lines in arms.items()}

  def size(arm: str) -> float:
    return arms[arm][0]['kv_cache_bytes_per_token']

  groups = [list(g) for _, g in itertools.groupby(sorted(arms, key=size), key=size)]
  pairs = max(1, sum(math.comb(len(group), 2) for group in groups))
  found = {}
  for group in groups:
    best = max(group, key=lambda arm: means[arm].mean)
    for arm in group:
      lines, mean = arms[arm], means[arm]
      difference = stats.difference(mean, means[best])
      found[arm] = {
        'recall': {
          'accuracies': {str(line['seed']): line['accuracy'] for line in lines},
          'mean_accuracy': mean.mean,
          'half_width': _finite(mean.half_width()),
          'bits_recalled': sum(line['bits_recalled'] for line in lines) / len(lines),
          'pairs_at_equal_bytes': pairs,
          'best_of_equal_bytes': best,
          'difference_at_equal_bytes': None if arm == best else difference.mean,
          'half_width_at_equal_bytes': (
            None if arm == best else _finite(difference.half_width(level / pairs))
          ),
        }
      }
  return found


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def knee(summary: Mapping[str, Any], attention: str = 'mla') -> float | None:
  """Bytes a token at which a variant's arms are half-way from guessing to all right.

  By straight lines between means over the logarithm of the bytes; None where they do not cross it.
  """
  half = (1 + 1 / summary['probe']['alphabet']) / 2
  points = sorted(
    (math.log(arm['kv_cache_bytes_per_token']), arm['recall']['mean_accuracy'])
    for arm in summary['arms']
    if arm['attention'] == attention
  )
  for (x, low), (other, high) in itertools.pairwise(points):
    if low < half <= high:
      return math.exp(x + (other - x) * (half - low) / (high - low))
  return None


def claim(summaries: Sequence[Mapping[str, Any]]) -> str:
  """Where each sweep's latents are half-way, in a sentence."""
  told = []
  for summary in summaries:
    probe, size = summary['probe'], knee(summary)
    where = 'at none of these sizes' if size is None else f'at {size:.0f} bytes'
    told.append(f'with {probe["bits_held"] / probe["records"]:g} bits a record {where}')
  return f'{summaries[0]["probe"]["task"]}: MLA is half-way from guessing {", ".join(told)}'
