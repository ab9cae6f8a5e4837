"""Of a sweep over a probe (mla/probes.py): accuracy beside loss, over the same seeds.

Loss goes on deciding learning rates, frontier and sweet spot; accuracy is what a probe is read by.
Differences at equal bytes are of all pairs, for the best is found by looking, and share what the
report may err: a family by itself, beside those of mla/sweep/frontier.py.
"""

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from mla import probes
from mla.errors import UserError
from mla.sweep import statistics as stats
from mla.sweep import widths
from mla.sweep.trials import REPEATED

SIZES = ('records', 'attributes', 'alphabet')

Lines = Sequence[Mapping[str, Any]]


def probe_of(lines: Lines) -> dict[str, Any] | None:
  """The probe that all lines are of; None where some are of text, or of a probe of another size.

  Bits are counted here, for older versions counted those of some probes otherwise.
  """
  sizes = {(line.get('probe'), *(line.get(name) for name in SIZES)) for line in lines}
  if len(sizes) != 1 or not all('accuracy' in line for line in lines):
    return None
  first = lines[0]
  probe = _probe(first)
  return {
    'task': first['probe'],
    **{name: first[name] for name in SIZES},
    'bits_held': probe.bits_held(),
    'guessing': 1 / probe.answers,
  }


def _probe(line: Mapping[str, Any]) -> probes.Probe:
  """The task and its size, of which a line doesn't tell a window's length."""
  records, attributes, alphabet = (line[name] for name in SIZES)
  return probes.PROBES[line['probe']](records, attributes, alphabet, 0)


def by_arm(arms: Mapping[str, Lines], fair: Set[str], level: float) -> dict[str, Any]:
  """{arm: its accuracies}, of each arm's lines that judge it.

  At equal bytes `fair` arms are compared: seeds of others failed, or chose their rate themselves.
  `level` is what these differences may err, all at once.
  """
  means = {arm: stats.estimate([line['accuracy'] for line in lines]) for arm, lines in arms.items()}

  def size(arm: str) -> float:
    return arms[arm][0]['kv_cache_bytes_per_token']

  groups = [list(g) for _, g in itertools.groupby(sorted(arms, key=size), key=size)]
  pairs = sum(math.comb(len(fair & set(group)), 2) for group in groups)
  found = {}
  for group in groups:
    rivals = sorted(fair & set(group))  # of a tie the first is the best, however sets are ordered
    best = max(rivals, key=lambda arm: means[arm].mean, default=None)
    for arm in group:
      lines, mean = arms[arm], means[arm]
      difference = None
      if best is not None and arm in fair and arm != best:
        difference = stats.difference(mean, means[best])
      found[arm] = {
        'accuracies': {str(line['seed']): line['accuracy'] for line in lines},
        'mean_accuracy': mean.mean,
        'half_width': stats.finite(mean.half_width()),
        'bits_recalled': sum(_probe(n).bits_recalled(n['accuracy']) for n in lines) / len(lines),
        'pairs_at_equal_bytes': pairs,
        'best_of_equal_bytes': best,
        'difference_at_equal_bytes': difference and difference.mean,
        'half_width_at_equal_bytes': (
          difference and stats.finite(difference.half_width(level / max(1, pairs)))
        ),
      }
  return found


def through(runs: Lines, cache: str, usual: str = 'bfloat16') -> list[dict[str, Any]]:
  """A sweep's trials read through two caches: by arm, what `cache` costs in accuracy and saves in
  bytes, smallest first.

  `runs` is eval.py's, with both for each trial; a trial's folder is called as its arm, and behind
  it by its rate and seed. Where an arm has several latents, each width is one. Differences are of
  the same weights, trial by trial; their half-widths two-sided 95 % over trials, each by itself,
  None of a single one. UserError where a trial was read through one of them only.
  """
  latents: dict[str, set[int | None]] = {}
  for run in runs:
    latents.setdefault(_arm(run), set()).add(run['latent_dim'])
  arms: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
  for run in runs:
    arm, latent = _arm(run), run['latent_dim']
    arm = arm if len(latents[arm]) == 1 else widths.name(arm, latent)
    arms.setdefault(arm, {}).setdefault(run['cache_dtype'], {})[run['workdir']] = run
  found = []
  for arm, by_cache in arms.items():
    one, other = (
      {trial: run['accuracy'] for trial, run in by_cache.get(name, {}).items()}
      for name in (cache, usual)
    )
    if not one or one.keys() != other.keys():
      told = f'was not read through {cache} and {usual} alike; run eval.py with both'
      raise UserError(f'{arm}: {told}')
    difference = stats.paired(one, other)
    first = {name: next(iter(by_cache[name].values())) for name in (usual, cache)}
    found.append({
      'arm': arm,
      'attention': first[usual]['attention'],
      'trials': len(one),
      'bytes': {name: run['kv_cache_bytes_per_token'] for name, run in first.items()},
      'accuracy': {
        usual: sum(other.values()) / len(other), cache: sum(one.values()) / len(one)
      },
      'difference': difference.mean,
      'half_width': stats.finite(difference.half_width()),
    })  # fmt: skip
  return sorted(found, key=lambda row: (row['bytes'][usual], row['arm']))


def _arm(run: Mapping[str, Any]) -> str:
  """A trial's folder without what an arm's trials differ in."""
  parts = Path(run['workdir']).name.split(',')
  return ','.join(part for part in parts if part.split('=')[0] not in REPEATED)


def knee(summary: Mapping[str, Any]) -> float:
  """Bytes a token at which the latents are half-way from guessing to all right.

  By straight lines between means over the logarithm of the bytes. Of latents of separate runs, of a
  nested run's where there are none such. 0 where all are beyond half, inf where none is. UserError
  for a summary of an older version.
  """
  if 'knobs' not in summary:
    raise UserError(
      'frontier.json: is of an older version; run python report.py --workdir=DIR again'
    )
  half = (1 + summary['probe']['guessing']) / 2
  arms = {arm['arm']: arm for arm in summary['arms']}
  points = sorted(
    (math.log(arms[name]['kv_cache_bytes_per_token']), arms[name]['recall']['mean_accuracy'])
    for name in next(iter(summary['knobs']), [])
  )
  for (x, low), (other, high) in itertools.pairwise(points):
    if low < half <= high:
      return math.exp(x + (other - x) * (half - low) / (high - low))
  return 0.0 if points and points[0][1] >= half else math.inf


def claim(summaries: Sequence[Mapping[str, Any]]) -> str:
  """Where each sweep's latents are half-way, in a sentence."""
  told = []
  for summary in summaries:
    probe, size = summary['probe'], knee(summary)
    if 0 < size < math.inf:
      where = f'at about {size:.0f} bytes'
    else:
      where = 'below all of these sizes' if size == 0 else 'at none of these sizes'
    told.append(f'with {probe["bits_held"] / probe["records"]:.3g} bits a record {where}')
  return f'{summaries[0]["probe"]["task"]}: MLA is half-way from guessing {", ".join(told)}'


def cost(panes: Mapping[str, Sequence[Mapping[str, Any]]], cache: str = 'int8') -> str:
  """{probe: rows of through}: the arm whose mean `cache` costs most, in a sentence."""
  probe, worst = min(
    ((probe, row) for probe, rows in panes.items() for row in rows),
    key=lambda found: found[1]['difference'],
  )
  return (
    f'Through {cache} the mean accuracy of an arm changes by {worst["difference"]:+.4f} at worst '
    f'({worst["arm"]}, {probe})'
  )
