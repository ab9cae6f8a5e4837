"""From a sweep's lines to its answer: per arm mean and interval, the frontier, the sweet spot.

The learning rate of an arm is the one with the lowest mean loss on the seeds that all its rates
have, where a failed trial counts as an infinite loss; its other seeds count only with that rate.
"""

import json
import math
import statistics as middle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla import results
from mla import statistics as stats
from mla.errors import UserError

MARGIN = 0.02  # nats a token
WIDTH = 0.01  # nats: a half-width above it is explained in the report


def best_learning_rates(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """{arm: learning rate} of the arms of which some trial is done."""
  return {arm: choose_rate(rates) for arm, rates in _losses(lines).items()}


def choose_rate(rates: Mapping[float, stats.Sample]) -> float:
  """The learning rate whose mean loss over the seeds that all rates have is lowest.

  If they share none, each rate's mean is over its own.
  """
  shared = set.intersection(*(set(sample) for sample in rates.values()))

  def mean(rate: float) -> float:
    sample = rates[rate]
    return float(np.mean([sample[seed] for seed in shared or sample]))

  return min(rates, key=mean)


def _losses(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
  """{arm: {learning rate: {seed: loss}}} of the arms of which some trial is done; failed: inf."""
  found: dict[str, dict[float, dict[int, float]]] = {}
  done = {line['arm'] for line in lines if line['status'] == 'done'}
  for line in lines:
    if line['arm'] in done:
      of_rate = found.setdefault(line['arm'], {}).setdefault(line['learning_rate'], {})
      of_rate[line['seed']] = line['loss'] if line['status'] == 'done' else math.inf
  return found


def summarise(folder: Path, reference: str = '', margin: float = MARGIN) -> dict[str, Any]:
  """What frontier.json holds, from results.jsonl and windows.npz; arms by cache bytes.

  `reference` is the arm that differences and the margin are taken against; '' takes the one with
  the largest cache (of those the one with the lowest loss). Raises UserError if nothing is done or
  the reference is not there. A number that the data does not give is None.
  """
  path = folder / 'results.jsonl'
  lines = results.unlike(results.read_lines(path))
  rates = _losses(lines)
  if not rates:
    raise UserError(f'{path}: holds no trial that is done; run the sweep first')
  chosen = {arm: choose_rate(of_arm) for arm, of_arm in rates.items()}
  losses: dict[str, stats.Sample] = {
    arm: {seed: loss for seed, loss in rates[arm][chosen[arm]].items() if math.isfinite(loss)}
    for arm in rates
  }
  used = [x for x in lines if x['status'] == 'done' and x['learning_rate'] == chosen[x['arm']]]
  of = {arm: [line for line in used if line['arm'] == arm] for arm in losses}
  sizes = {arm: of[arm][0]['kv_cache_bytes_per_token'] for arm in losses}
  means = {arm: stats.estimate(list(losses[arm].values())) for arm in losses}
  if reference and reference not in losses:
    raise UserError(f'--reference={reference}: no such arm; choose one of {", ".join(losses)}')
  reference = reference or min(losses, key=lambda arm: (-sizes[arm], means[arm].mean))
  frontier = stats.on_frontier(losses, sizes)
  windows = _window_means(folder, used)
  arms = []
  for arm in sorted(losses, key=lambda arm: (sizes[arm], means[arm].mean)):
    first = of[arm][0]
    tried = sorted(rates[arm])
    against = stats.difference(losses[arm], losses[reference])
    equals = [other for other in losses if sizes[other] == sizes[arm]]
    best = min(equals, key=lambda other: means[other].mean)
    behind = stats.difference(losses[arm], losses[best])
    arms.append(
      {
        'arm': arm,
        'attention': first['attention'],
        'latent_dim': first['latent_dim'],
        'fields': {k: v for k, v in first['fields'].items() if k not in ('seed', 'learning_rate')},
        'kv_cache_bytes_per_token': sizes[arm],
        'seeds': means[arm].seeds,
        'mean_loss': means[arm].mean,
        'half_width': _finite(means[arm].half_width),
        'ci95': _bounds(means[arm]),
        'seeds_for_width': stats.seeds_for_width(means[arm], WIDTH),
        'mean_bits_per_byte': float(np.mean([line['bits_per_byte'] for line in of[arm]])),
        'params_total': first['params_total'],
        'params_non_embedding': first['params_non_embedding'],
        'learning_rate': chosen[arm],
        'learning_rates_tried': tried,
        'learning_rate_at_edge': len(tried) > 1 and chosen[arm] in (tried[0], tried[-1]),
        **results.costs_of(folder, first),
        'tokens_per_second': _median(line['tokens_per_second'] for line in of[arm]),
        'difference': None if against is None or arm == reference else _describe(against),
        'best_of_equal_bytes': best,
        'difference_at_equal_bytes': None if behind is None or arm == best else _describe(behind),
        'difference_windows_half_width': _windows_half_width(windows, arm, reference),
        'on_frontier': frontier[arm],
        'failed': [x['trial'] for x in lines if x['arm'] == arm and x['status'] == 'failed'],
      }
    )
  return {
    'reference': reference,
    'margin': margin,
    'cache_dtype': used[0]['cache_dtype'],
    'tokens_evaluated': used[0]['tokens_evaluated'],
    'unlike_settings': _unlike_settings(used),
    'sweet_spot': stats.sweet_spot(losses, sizes, reference, margin)._asdict(),
    'failed': [
      {'trial': line['trial'], 'error': line['error']} for line in lines if 'error' in line
    ],
    'arms': arms,
  }


def _median(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return middle.median(known) if known else None


def _unlike_settings(lines: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  """{field: values} where trials that do not set a field themselves have it from unlike configs."""
  values: dict[str, list] = {}
  for line in lines:
    for name, value in line.get('settings', {}).items():
      if value not in values.setdefault(name, []):
        values[name].append(value)
  return {name: of_field for name, of_field in values.items() if len(of_field) > 1}


def write_json(summary: Mapping[str, Any], path: Path) -> None:
  path.write_text(json.dumps(summary, indent=2, allow_nan=False) + '\n')


def _describe(d: stats.Estimate) -> dict[str, Any]:
  return {
    'mean': d.mean,
    'ci95': _bounds(d),
    'upper_bound_95': _finite(stats.upper_bound(d)),
    'seeds': d.seeds,
  }


def _bounds(e: stats.Estimate) -> list[float] | None:
  return [e.low, e.high] if math.isfinite(e.half_width) else None


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _window_means(folder: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
  """{arm: {seed: loss of each window [W]}}"""
  found: dict[str, dict[int, np.ndarray]] = {}
  stored = results.read_windows(folder / 'windows.npz')
  for line in lines:
    if line['trial'] in stored:
      nll = stored[line['trial']]
      per_window = line['tokens_evaluated'] / len(nll)
      found.setdefault(line['arm'], {})[line['seed']] = nll / per_window
  return found


def _windows_half_width(windows: dict[str, dict], arm: str, reference: str) -> float | None:
  """1.96 standard errors, over windows, of the difference: how far another text would move it."""
  shared = windows.get(arm, {}).keys() & windows.get(reference, {}).keys()
  if arm == reference or not shared:
    return None
  if any(windows[arm][seed].shape != windows[reference][seed].shape for seed in shared):
    return None  # other windows, for seq_len differs
  d = np.mean([windows[arm][seed] - windows[reference][seed] for seed in shared], axis=0)
  return float(1.96 * np.std(d, ddof=1) / math.sqrt(len(d))) if len(d) > 1 else None
