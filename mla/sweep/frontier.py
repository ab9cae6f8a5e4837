"""From a sweep's lines to its answer: per arm mean and interval, the frontier, the sweet spot.

tuning.py says which seeds judge an arm. An arm of which a judged seed failed has no finite
mean: any arm without failures is better, it is neither on the frontier nor the sweet spot, and no
difference is taken to it; its `mean_loss` is that of the seeds that finished. By an arm without
a judged seed (`tuned_on_itself`) nothing is decided.

What is said of several arms at once shares what this look may err (looks.py), in four families:
the bounds against the reference, which decide the sweet spot; the frontier's verdicts; the
differences at equal bytes, of all pairs, for the best is found by looking; the steps from each
latent to the next. Each family holds as a whole, *simultaneously*, with 95 % confidence over all
looks. `ci95` and `half_width` are two-sided 95 % of one figure by itself.
"""

import itertools
import json
import math
import statistics as middle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla import files
from mla.errors import UserError
from mla.sweep import looks, recall, results, tuning, widths
from mla.sweep import statistics as stats

MARGIN = 0.02  # nats a token
WIDTH = 0.01  # nats: a half-width above it is explained in the report


class Arm(NamedTuple):
  name: str
  size: float  # cache bytes a token
  mean: stats.Estimate  # over the seeds that judge it and finished
  judged: tuning.Judged
  tried: list[float]  # learning rates
  lines: list[Mapping[str, Any]]  # of the trials its mean is over
  failed: list[str]  # its trials that failed, at any rate

  @property
  def whole(self) -> bool:
    """None of its judged seeds failed."""
    return not self.judged.failed

  @property
  def latent(self) -> int | None:
    return self.lines[0]['latent_dim']

  @property
  def joined(self) -> bool:
    """The sweep did not train it."""
    return bool(self.lines[0].get(results.JOINED))

  @property
  def trained(self) -> str:
    """The arm whose runs it is read from: its own, but for a prefix of a nested latent."""
    return self.lines[0].get('prefix_of', self.name)


def summarise(folder: Path, reference: str = '', margin: float = MARGIN) -> dict[str, Any]:
  """What frontier.json holds, from results.jsonl, windows.npz and looks.json; arms by cache bytes.

  `reference` is the arm that differences and the margin are taken against; '' takes the one with
  the largest cache of those without failures that the sweep trained (of equals the one with the
  lowest loss). Raises UserError if nothing is done, the reference is not there, or trials are of
  unlike texts or tokens. A number that the data does not give is None. The order of the lines plays
  no part.
  """
  path = folder / 'results.jsonl'
  lines = results.unlike(results.read_lines(path))
  _of_one_text(path, lines)
  lines.sort(key=lambda line: (line['arm'], line['learning_rate'], line['seed'], line['trial']))
  arms = _arms(widths.by_width(lines))
  if not arms:
    raise UserError(f'{path}: holds no trial that is done; run the sweep first')
  by_name = {arm.name: arm for arm in arms}
  if reference and reference not in by_name:
    raise UserError(f'--reference={reference}: no such arm; choose one of {", ".join(by_name)}')
  base = by_name[reference] if reference else min(arms, key=_as_reference)
  done = [line for line in lines if line['status'] == 'done']
  seeds = sorted({line['seed'] for line in done})
  history, look = looks.history(
    folder, {'seeds': seeds, 'trials': len(done), 'reference': base.name}
  )
  level = looks.level(look)
  sizes = {arm.name: arm.size for arm in arms}
  spot = _sweet_spot(_means(arms), sizes, base.name, margin, level, _by_seed(_runs(arms)))
  verdicts = _on_frontier(arms, level)
  equals, pairs = _at_equal_bytes(arms, level)
  steps = _latent_steps(arms, level)
  windows = _window_means(folder, arms)
  probe = recall.probe_of([line for arm in arms for line in arm.lines])
  recalled = _recalled(arms, level) if probe else {}
  return {
    'reference': base.name,
    'margin': margin,
    'cache_dtype': arms[0].lines[0]['cache_dtype'],
    'tokens_evaluated': arms[0].lines[0]['tokens_evaluated'],
    **({'probe': probe} if probe else {}),
    'unlike_settings': _unlike_settings([line for arm in arms for line in arm.lines]),
    'look': look,
    'look_level': level,
    'looks': history,
    'correlation': _correlation(arms),
    'pairs_at_equal_bytes': pairs,
    'latent_steps': len(steps),
    'sweet_spot': spot._asdict(),
    'failed': [
      {'trial': line['trial'], 'error': line['error']} for line in lines if 'error' in line
    ],
    'knobs': [[arm.name for arm in family] for family in _knobs(arms)],
    'failed_arms': sorted({line['arm'] for line in lines} - by_name.keys()),
    'arms': [
      {
        **_figures(arm, folder),
        'difference': _against(arm, base, spot.level),
        'difference_windows_half_width': _windows_half_width(windows, arm, base),
        'on_frontier': verdicts[arm.name],
        **equals[arm.name],
        **steps.get(arm.name, {'smaller_latent': None, 'difference_to_smaller_latent': None}),
        **({'recall': recalled[arm.name]} if probe else {}),
      }
      for arm in arms
    ],
  }


def _as_reference(arm: Arm) -> tuple:
  """The least is the best: a run that the sweep did not train only where there is no other."""
  return not arm.whole, arm.judged.tuned_on_itself, arm.joined, -arm.size


def _of_one_text(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
  for line in (line for line in lines if 'data_digest' in line):
    other = results.other_text(line, lines)
    if other is None:
      return  # all are of this one's, or don't tell
    unlike = results.told_apart(line, other) or 'their files differ'
    raise UserError(
      f'{path}: trials {line["trial"]} and {other["trial"]} did not read the same text in the '
      f'same tokens ({unlike}), and nats a token of the two cannot be compared; move the lines '
      'of the one kind to a results.jsonl in a folder of its own'
    )


def _arms(lines: Sequence[Mapping[str, Any]]) -> list[Arm]:
  """The arms of which some trial is done, by cache bytes, then by loss."""
  found = []
  by_arm = itertools.groupby(sorted(lines, key=_arm_of), key=_arm_of)
  of_arm = {name: list(group) for name, group in by_arm}
  of_rates = tuning.by_arm(lines)
  for name, rates in of_rates.items():
    judged = tuning.judge(rates, of_rates.get(of_arm[name][0].get('prefix_of', name)))
    used = [
      line
      for line in of_arm[name]
      if line['status'] == 'done'
      and line['learning_rate'] == judged.rate
      and line['seed'] in judged.losses
    ]
    found.append(
      Arm(
        name,
        used[0]['kv_cache_bytes_per_token'],
        stats.estimate(list(judged.losses.values())),
        judged,
        sorted(rates),
        used,
        [line['trial'] for line in of_arm[name] if line['status'] == 'failed'],
      )
    )
  return sorted(found, key=lambda arm: (arm.size, arm.mean.mean, arm.name))


def _arm_of(line: Mapping[str, Any]) -> str:
  return line['arm']


def _figures(arm: Arm, folder: Path) -> dict[str, Any]:
  """What concerns one arm alone."""
  first, judged = arm.lines[0], arm.judged
  rates = (line['tokens_per_second'] for line in arm.lines)
  speeds = [rate for rate in rates if rate is not None]
  return {
    'arm': arm.name,
    'attention': first['attention'],
    'latent_dim': arm.latent,
    'fields': {k: v for k, v in first['fields'].items() if k not in ('seed', 'learning_rate')},
    'kv_cache_bytes_per_token': arm.size,
    'seeds': len(judged.losses),
    'failed_seeds': judged.failed,
    'tuning_seed': judged.tuning_seed,
    'tuned_on_itself': judged.tuned_on_itself,
    'losses': {str(seed): loss for seed, loss in judged.losses.items()},  # JSON's keys are strings
    'mean_loss': arm.mean.mean,
    'half_width': stats.finite(arm.mean.half_width()),
    'ci95': _bounds(arm.mean, stats.LEVEL),
    'seeds_for_width': stats.seeds_for_width(arm.mean, WIDTH),
    'mean_bits_per_byte': _mean('bits_per_byte', arm.lines),
    'params_total': first['params_total'],
    'params_non_embedding': first['params_non_embedding'],
    'learning_rate': judged.rate,
    'learning_rates_tried': arm.tried,
    'learning_rate_at_edge': judged.at_edge,
    **results.costs_of(folder, first),
    'tokens_per_second': middle.median(speeds) if speeds else None,
    'failed': arm.failed,
    **({'prefix_of': arm.trained} if arm.trained != arm.name else {}),
    **({'joined': True} if arm.joined else {}),
  }


def _mean(name: str, lines: Sequence[Mapping[str, Any]]) -> float | None:
  """Of a figure over trials; None where they have none."""
  values = [line[name] for line in lines if line.get(name) is not None]
  return float(np.mean(values)) if values else None


def sweet_spot_at(summary: Mapping[str, Any], margin: float) -> dict[str, Any]:
  """The sweet spot that summarise would have found with another margin; for no other look."""
  arms = summary['arms']
  whole = {
    arm['arm']: stats.estimate(list(arm['losses'].values()))
    for arm in arms
    if not arm['failed_seeds']
  }
  sizes = {arm['arm']: arm['kv_cache_bytes_per_token'] for arm in arms}
  by_seed = _by_seed(
    (arm.get('prefix_of', arm['arm']), arm['arm'], arm['losses'])
    for arm in arms
    if arm['arm'] in whole
  )
  level = summary['look_level']
  return _sweet_spot(whole, sizes, summary['reference'], margin, level, by_seed)._asdict()


def _sweet_spot(
  whole: Mapping[str, stats.Estimate],
  sizes: Mapping[str, float],
  reference: str,
  margin: float,
  level: float,
  by_seed: Mapping[tuple[str, str], stats.Estimate],
) -> stats.SweetSpot:
  """Of the arms without failures, `whole`; `sizes` has the reference's too, whole or not."""
  if reference in whole:
    to_it = {arm: d for (arm, other), d in by_seed.items() if other == reference}
    return stats.sweet_spot(whole, sizes, reference, margin, level, to_it)
  smaller = [arm for arm in whole if sizes[arm] < sizes[reference]]
  return stats.SweetSpot(None, tuple(smaller), dict.fromkeys(smaller), level)


def _on_frontier(arms: Sequence[Arm], level: float) -> dict[str, str]:
  sizes = {arm.name: arm.size for arm in arms}
  verdicts = stats.on_frontier(_means(arms), sizes, level, _by_seed(_runs(arms)))
  for arm in arms:
    if not arm.whole:
      verdicts[arm.name] = 'no'
    elif arm.judged.tuned_on_itself and verdicts[arm.name] == 'yes':  # it has no rivals
      verdicts[arm.name] = 'uncertain'
  return verdicts


def _at_equal_bytes(arms: Sequence[Arm], level: float) -> tuple[dict[str, dict[str, Any]], int]:
  """{arm: the best of its bytes and the difference to it}; and how many pairs share the level."""
  groups = [list(group) for _, group in itertools.groupby(arms, key=lambda arm: arm.size)]
  pairs = sum(math.comb(sum(map(_fair, group)), 2) for group in groups)
  found = {}
  for group in groups:
    best = min(group, key=lambda arm: (not arm.whole, not _fair(arm), arm.mean.mean))
    for arm in group:
      found[arm.name] = {
        'best_of_equal_bytes': best.name,
        'difference_at_equal_bytes': _simultaneous(arm, best, level / max(1, pairs)),
      }
  return found, pairs


def _fair(arm: Arm) -> bool:
  """Whether anything can be decided by it: no seed failed, and none both chose and judges."""
  return arm.whole and not arm.judged.tuned_on_itself


def _recalled(arms: Sequence[Arm], level: float) -> dict[str, Any]:
  fair = {arm.name for arm in arms if _fair(arm)}
  return recall.by_arm({arm.name: arm.lines for arm in arms}, fair, level)


def _knobs(arms: Sequence[Arm]) -> list[list[Arm]]:
  """Arms with a latent, by its width: those with a run of their own; each nested run's. What is
  but one arm goes last."""
  latents = sorted((arm for arm in arms if arm.latent), key=lambda arm: (arm.latent, arm.size))
  nested = {arm.trained for arm in latents if arm.trained != arm.name}
  families = [[arm for arm in latents if arm.trained not in nested]]
  families += [[arm for arm in latents if arm.trained == whole] for whole in sorted(nested)]
  return sorted(filter(None, families), key=lambda family: len(family) == 1)


def _latent_steps(arms: Sequence[Arm], level: float) -> dict[str, dict[str, Any]]:
  """{arm with a latent: the one with the next smaller, and the difference to it}."""
  steps = [
    (smaller, arm)
    for family in _knobs([arm for arm in arms if arm.whole])
    for smaller, arm in itertools.pairwise(family)
    if smaller.lines[0]['latent_dim'] < arm.lines[0]['latent_dim']
  ]
  return {
    arm.name: {
      'smaller_latent': smaller.name,
      'difference_to_smaller_latent': _simultaneous(arm, smaller, level / len(steps)),
    }
    for smaller, arm in steps
  }


def _means(arms: Sequence[Arm]) -> dict[str, stats.Estimate]:
  """Of the arms without failures: the others' are not finite, and need no comparing."""
  return {arm.name: arm.mean for arm in arms if arm.whole}


def _runs(arms: Sequence[Arm]) -> Iterator[tuple[str, str, stats.Sample]]:
  """(Whose runs it is read from, the arm, its losses), of the arms without failures."""
  return ((arm.trained, arm.name, arm.judged.losses) for arm in arms if arm.whole)


def _by_seed(
  runs: Iterable[tuple[str, str, stats.Sample]],
) -> dict[tuple[str, str], stats.Estimate]:
  """{(arm, other): arm - other} of those that are widths of one nested run, in both orders."""
  of_run: dict[str, dict[str, stats.Sample]] = {}
  for run, arm, losses in runs:
    of_run.setdefault(run, {})[arm] = losses
  return {
    (arm, other): stats.paired(arms[arm], arms[other])
    for arms in of_run.values()
    for arm, other in itertools.permutations(arms, 2)
  }


def _correlation(arms: Sequence[Arm]) -> dict[str, Any] | None:
  independent = [arm for arm in arms if arm.whole and arm.trained == arm.name]
  found = stats.mean_correlation([arm.judged.losses for arm in independent])
  return None if found is None else dict(zip(('mean', 'pairs', 'seeds'), found, strict=True))


def _difference(arm: Arm, other: Arm) -> stats.Estimate:
  """Of independent samples; of widths of one nested run, whose losses move together, by seed."""
  if arm.trained != other.trained:
    return stats.difference(arm.mean, other.mean)
  return stats.paired(arm.judged.losses, other.judged.losses)


def _against(arm: Arm, base: Arm, level: float) -> dict[str, Any] | None:
  """The difference to the reference: its interval, and its bounds among those of all arms."""
  if arm.name == base.name or not (arm.whole and base.whole):
    return None
  d, smaller = _difference(arm, base), arm.size < base.size
  return {
    'mean': d.mean,
    'degrees_of_freedom': d.freedom,
    'ci95': _bounds(d, stats.LEVEL),
    'one_sided_lower_95_simultaneous': stats.finite(d.lower(level)) if smaller else None,
    'one_sided_upper_95_simultaneous': stats.finite(d.upper(level)) if smaller else None,
  }


def _simultaneous(arm: Arm, other: Arm, level: float) -> dict[str, Any] | None:
  if arm.name == other.name or not (arm.whole and other.whole):
    return None
  d = _difference(arm, other)
  return {
    'mean': d.mean,
    'degrees_of_freedom': d.freedom,
    'ci95_simultaneous': _bounds(d, level),
  }


def _bounds(e: stats.Estimate, level: float) -> list[float] | None:
  """The two-sided interval that misses the truth with chance `level`."""
  half_width = e.half_width(level)
  return [e.mean - half_width, e.mean + half_width] if math.isfinite(half_width) else None


def _unlike_settings(lines: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  """{field: values} where trials that do not set a field themselves have it from unlike configs."""
  values: dict[str, list] = {}
  for line in lines:
    for name, value in line.get('settings', {}).items():
      if value not in values.setdefault(name, []):
        values[name].append(value)
  return {name: of_field for name, of_field in values.items() if len(of_field) > 1}


def write_json(summary: Mapping[str, Any], path: Path) -> None:
  files.write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + '\n')


def _window_means(folder: Path, arms: Sequence[Arm]) -> dict[str, np.ndarray]:
  """{arm: mean loss of each window [W] over the seeds that judge it}, of the arms that have it."""
  stored = results.read_windows(folder / 'windows.npz')
  found = {}
  for arm in arms:
    seeds = [
      stored[line['trial']] / (line['tokens_evaluated'] / len(stored[line['trial']]))
      for line in arm.lines
      if line['trial'] in stored
    ]
    if seeds and len({len(windows) for windows in seeds}) == 1:
      found[arm.name] = np.mean(seeds, axis=0)
  return found


def _windows_half_width(windows: Mapping[str, np.ndarray], arm: Arm, base: Arm) -> float | None:
  """1.96 standard errors, over windows, of the difference: how far another text would move it."""
  ours, theirs = windows.get(arm.name), windows.get(base.name)
  if arm.name == base.name or ours is None or theirs is None or ours.shape != theirs.shape:
    return None  # other windows, for seq_len differs
  d = ours - theirs
  return float(1.96 * np.std(d, ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None
