"""Which learning rate an arm takes, and which seeds then judge it.

**Tuned on one seed, judged on the others.** An arm's tuning seed is the one with which most of its
learning rates ran (of those with which any finished; of several the lowest). Its rate is the one
whose loss is lowest there, where a failed trial is an infinite loss, and of equals the lower rate.
That seed then does not count: whatever chooses a rate makes its own loss look good. So the arm's
mean is over its other seeds with that rate, also where all rates ran with all seeds: there too one
seed chooses, for with two every further one would be lost to judging. An arm with a single rate
has tuned nothing, and all its seeds count. The order of flags and of results plays no part.

**Failures count.** A judged seed that failed is listed, and never just left out of a mean.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mla.sweep import statistics as stats

FLAT = 1e-4  # nats a token: rates whose losses differ by less are alike
Rates = Mapping[float, stats.Sample]  # {learning rate: {seed: loss}} of an arm; failed: inf


class Judged(NamedTuple):
  """What an arm is judged by."""

  rate: float
  tuning_seed: int | None  # None: a single rate, so nothing was tuned
  losses: dict[int, float]  # that its mean is over, by seed
  failed: list[int]  # judged seeds that failed
  tuned_on_itself: bool  # no judged seed finished: the one loss is the tuning seed's
  at_edge: bool  # a rate beyond those tried may be better


def judge(rates: Rates, chosen_by: Rates | None = None) -> Judged:
  """Chooses an arm's learning rate and takes the seeds that did not choose it.

  chosen_by: the losses that choose, of an arm that is part of another one's runs.
  """
  choosing = rates if chosen_by is None else chosen_by
  seed = tuning_seed(choosing)
  rate = min((sample[seed], rate) for rate, sample in choosing.items() if seed in sample)[1]
  tuning = seed if len(rates) > 1 else None
  judged = {s: loss for s, loss in sorted(rates[rate].items()) if s != tuning}
  finished = {s: loss for s, loss in judged.items() if math.isfinite(loss)}
  failed = [s for s in judged if s not in finished]
  losses = finished or {seed: rates[rate][seed]}
  edge = _at_edge({of: sample[seed] for of, sample in choosing.items() if seed in sample}, rate)
  return Judged(rate, tuning, losses, failed, tuned_on_itself=not finished, at_edge=edge)


def _at_edge(losses: Mapping[float, float], rate: float) -> bool:
  """Whether a rate is the lowest or highest tried, and better than the one beside it.

  To the four digits that are told: where two of them are alike, the curve is flat.
  """
  tried = sorted(losses)
  if len(tried) == 1 or rate not in (tried[0], tried[-1]):
    return False
  beside = tried[1] if rate == tried[0] else tried[-2]
  return losses[beside] - losses[rate] >= FLAT


def tuning_seed(rates: Rates) -> int:
  """The seed that chooses an arm's rate; some trial of it must have finished."""
  ran = [seed for sample in rates.values() for seed in sample]
  finished = {s for sample in rates.values() for s, loss in sample.items() if math.isfinite(loss)}
  return max(finished, key=lambda seed: (ran.count(seed), -seed))


def by_arm(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
  """{arm: {learning rate: {seed: loss}}} of the arms of which some trial is done; failed: inf."""
  found: dict[str, dict[float, dict[int, float]]] = {}
  for line in lines:
    sample = found.setdefault(line['arm'], {}).setdefault(line['learning_rate'], {})
    sample[line['seed']] = line['loss'] if line['status'] == 'done' else math.inf
  return {
    arm: rates
    for arm, rates in found.items()
    if any(math.isfinite(loss) for sample in rates.values() for loss in sample.values())
  }
