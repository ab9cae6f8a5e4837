"""How sure we are: intervals over seeds, paired differences, the frontier and the sweet spot.

Losses are nats a token. A `Sample` maps a seed to the loss of that seed's trial. Two arms are
compared seed by seed on the same evaluation windows, because part of a seed's luck (the order of
the data) is common to both. Intervals are Student's t with n - 1 degrees of freedom.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

Sample = Mapping[int, float]

MOST_SEEDS = 1000  # beyond which "more seeds" is no advice


class Estimate(NamedTuple):
  """A mean over seeds; sd and the half-width of its 95 % interval are infinite for one seed."""

  mean: float
  sd: float
  half_width: float
  seeds: int

  @property
  def low(self) -> float:
    return self.mean - self.half_width

  @property
  def high(self) -> float:
    return self.mean + self.half_width


def estimate(values: list[float]) -> Estimate:
  """Mean and 95 % interval: mean -/+ t(0.975, n-1) sd / sqrt(n)."""
  n, mean = len(values), float(np.mean(values))
  if n < 2:
    return Estimate(mean, math.inf, math.inf, n)
  sd = float(np.std(values, ddof=1))
  return Estimate(mean, sd, float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n), n)


def difference(a: Sample, b: Sample) -> Estimate | None:
  """a - b over the seeds both have; None if there is none."""
  shared = sorted(a.keys() & b.keys())
  return estimate([a[seed] - b[seed] for seed in shared]) if shared else None


def upper_bound(d: Estimate) -> float:
  """What the true mean lies below with 95 % confidence (one-sided)."""
  if d.seeds < 2:
    return math.inf
  return d.mean + float(stats.t.ppf(0.95, d.seeds - 1)) * d.sd / math.sqrt(d.seeds)


def lower_bound(d: Estimate) -> float:
  """What the true mean lies above with 95 % confidence (one-sided)."""
  return 2 * d.mean - upper_bound(d)


def seeds_needed(d: Estimate, margin: float) -> int | None:
  """Seeds in all that would tell on which side of the margin d lies, if mean and sd stayed.

  That is, at which the one-sided 95 % bound passes it. None if sd is unknown, or above MOST_SEEDS.
  """
  if not math.isfinite(d.sd):
    return None
  for n in range(2, MOST_SEEDS + 1):
    if float(stats.t.ppf(0.95, n - 1)) * d.sd / math.sqrt(n) <= abs(margin - d.mean):
      return n
  return None


def on_frontier(losses: Mapping[str, Sample], sizes: Mapping[str, float]) -> dict[str, str]:
  """'yes', 'no' or 'uncertain' for each arm: does no other with as few bytes have a lower loss?

  'no' if some rival of no more bytes is better with 95 % confidence; 'yes' if the arm is better
  than every such rival with 95 % confidence each; else 'uncertain'. The confidence is per pair.
  """
  verdicts = {}
  for arm, loss in losses.items():
    rivals = [r for r in losses if r != arm and sizes[r] <= sizes[arm]]
    pairs = [difference(loss, losses[rival]) for rival in rivals]
    if any(d is not None and d.low > 0 for d in pairs):
      verdicts[arm] = 'no'
    elif all(d is not None and d.high < 0 for d in pairs):
      verdicts[arm] = 'yes'
    else:
      verdicts[arm] = 'uncertain'
  return verdicts


def seeds_for_width(e: Estimate, half_width: float) -> int | None:
  """Seeds at which the 95 % half-width would be at most this if sd stayed; None if unknown."""
  if not math.isfinite(e.sd):
    return None
  for n in range(2, MOST_SEEDS + 1):
    if float(stats.t.ppf(0.975, n - 1)) * e.sd / math.sqrt(n) <= half_width:
      return n
  return None


class SweetSpot(NamedTuple):
  arm: str | None  # the smallest arm within the margin with 95 % confidence
  undecided: tuple[str, ...]  # smaller ones that may be within it, the data cannot tell
  seeds_in_all: dict[str, int | None]  # that would settle each of those; None: no number


def sweet_spot(
  losses: Mapping[str, Sample], sizes: Mapping[str, float], reference: str, margin: float
) -> SweetSpot:
  """The smallest cache whose loss is within `margin` nats of the reference's.

  Within: the one-sided 95 % upper bound of the paired difference is at most the margin; not within:
  the lower bound is above it; else undecided, if the cache is smaller than the sweet spot's. An arm
  of the reference's bytes saves nothing and is left out.
  """
  inside, open_ = [], []
  for arm in losses:
    d = difference(losses[arm], losses[reference])
    if arm == reference:
      inside.append(arm)
    elif sizes[arm] < sizes[reference]:
      if d is not None and upper_bound(d) <= margin:
        inside.append(arm)
      elif d is None or lower_bound(d) <= margin:
        open_.append(arm)
  # Of equal bytes the best; the reference only if nothing is smaller.
  spot = min(inside, key=lambda a: (sizes[a], np.mean(list(losses[a].values()))))
  undecided = sorted((a for a in open_ if sizes[a] < sizes[spot]), key=lambda a: sizes[a])
  found = None if spot == reference and undecided else spot
  needed = {}
  for arm in undecided:
    d = difference(losses[arm], losses[reference])
    needed[arm] = None if d is None else seeds_needed(d, margin)
  return SweetSpot(found, tuple(undecided), needed)
