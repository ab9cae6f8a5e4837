"""How sure we are: intervals over seeds, differences between arms, the frontier and the sweet spot.

Losses are nats a token. A seed draws both the weights and the order of the data, and two arms are
compared as independent samples of seeds: Welch's t (Biometrika 34, 1947) with Satterthwaite's
degrees of freedom (Biometrics Bulletin 2, 1946). They are not paired by seed: weights of different
shapes have no luck in common, and over the 78 pairs of results/frontier the mean correlation is
0.01. Pairing would give away half of the degrees of freedom for it, and let one pair that agrees by
chance (0.99 over six seeds) pass for certain. `mean_correlation` keeps watch; were arms to go up
and down together, the intervals here would be too wide, not too narrow. Widths of one nested run
are the exception: they have all luck in common, and are compared seed by seed (`paired`).

A `level` is the chance of error that may be spent. Statements about several arms share it in equal
parts (Bonferroni; Dunn, JASA 56, 1961), so that all of them hold at once: *simultaneous*.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy import special

Sample = Mapping[Any, float]  # {seed: loss}; in JSON seeds are strings

LEVEL = 0.05  # of an interval that stands by itself
MOST_SEEDS = 1000  # beyond which "more seeds" is no advice


class Estimate(NamedTuple):
  """A mean over seeds, or a difference of two such means.

  Where too few seeds tell the standard error, it is infinite, with no degrees of freedom.
  """

  mean: float
  error: float  # standard error
  freedom: float  # degrees of freedom

  def half_width(self, level: float = LEVEL) -> float:
    """Of the two-sided interval that misses the truth with this chance."""
    return quantile(level / 2, self.freedom) * self.error

  def upper(self, level: float) -> float:
    """What the truth exceeds with this chance at most (one-sided)."""
    return self.mean + quantile(level, self.freedom) * self.error

  def lower(self, level: float) -> float:
    """What the truth stays below with this chance at most (one-sided)."""
    return self.mean - quantile(level, self.freedom) * self.error


def quantile(level: float, freedom: float) -> float:
  """Student's t that is exceeded with chance `level`; infinite without degrees of freedom."""
  return -float(special.stdtrit(freedom, level)) if freedom > 0 else math.inf


def estimate(values: Sequence[float]) -> Estimate:
  """The mean, its standard error sd / sqrt(n), and n - 1 degrees of freedom."""
  n, mean = len(values), float(np.mean(values))
  if n < 2:
    return Estimate(mean, math.inf, 0.0)
  return Estimate(mean, float(np.std(values, ddof=1)) / math.sqrt(n), float(n - 1))


def difference(a: Estimate, b: Estimate) -> Estimate:
  """a - b of independent samples (Welch)."""
  error, freedom = _welch(a.error, a.freedom, b.error, b.freedom)
  return Estimate(a.mean - b.mean, float(error), float(freedom))


def paired(a: Sample, b: Sample) -> Estimate:
  """a - b over the seeds that both have, of arms that are read from the same runs."""
  return estimate([a[seed] - b[seed] for seed in a if seed in b])


def _welch(error_a, freedom_a, error_b, freedom_b) -> tuple[np.ndarray, np.ndarray]:
  """Standard error and degrees of freedom of differences; numbers, or arrays that broadcast.

  Satterthwaite's, but no more than two arms of the smaller number of seeds would have. At a level
  of 0.1 %, as many arms at once need it, his alone err 0.3 to 1.5 times as often as they say with
  as many seeds on both sides (standard deviations up to 3 to 1), but 13 times with 2 seeds that
  spread against 5 that don't (simulated); so limited, about twice at most.
  """
  error = np.asarray(np.hypot(error_a, error_b))
  with np.errstate(invalid='ignore', divide='ignore'):
    share = np.square(np.divide(error_a, error))  # of the variance
    share = np.where(error > 0, share, 0.5)
    freedom = 1 / (share**2 / freedom_a + (1 - share) ** 2 / freedom_b)
  freedom = np.minimum(freedom, 2 * np.minimum(freedom_a, freedom_b))
  return error, np.where(np.isfinite(error), freedom, 0)


def mean_correlation(samples: Sequence[Sample]) -> tuple[float, int, int] | None:
  """(mean correlation of two arms over the seeds that all have, pairs, seeds).

  None with fewer than two arms or three seeds. An arm whose losses are all equal is left out.
  """
  shared = sorted(set.intersection(*(set(sample) for sample in samples))) if samples else []
  losses = np.array([[sample[seed] for seed in shared] for sample in samples])
  losses = losses[np.ptp(losses, axis=1) > 0] if len(shared) >= 3 else losses[:0]
  if len(losses) < 2:
    return None
  pairs = np.corrcoef(losses)[np.triu_indices(len(losses), 1)]
  return float(np.mean(pairs)), len(pairs), len(shared)


def seeds_needed(
  a: Estimate, b: Estimate, margin: float, level: float, by_seed: Estimate | None = None
) -> int | None:
  """Seeds of each arm that would tell on which side of the margin a - b lies, if nothing moved.

  That is, at which the one-sided bound at `level` passes it while means and standard deviations
  stay. `by_seed` is a - b where that is paired. None if a standard deviation is unknown, or above
  MOST_SEEDS.
  """
  if not math.isfinite((by_seed or difference(a, b)).error):
    return None

  def with_seeds(e: Estimate, n: int) -> Estimate:
    return Estimate(e.mean, e.error * math.sqrt((e.freedom + 1) / n), float(n - 1))

  def tells(n: int) -> bool:
    independent = difference(with_seeds(a, n), with_seeds(b, n))
    d = with_seeds(by_seed, n) if by_seed else independent
    return d.upper(level) - d.mean <= abs(margin - d.mean)

  return _first(tells)


def finite(value: float) -> float | None:
  """The value, None if it is not finite, as JSON has it."""
  return value if math.isfinite(value) else None


def seeds_for_width(e: Estimate, half_width: float) -> int | None:
  """Seeds at which an arm's two-sided 95 % half-width would be this, if sd stayed, or None."""
  if not math.isfinite(e.error):
    return None
  sd = e.error * math.sqrt(e.freedom + 1)
  return _first(lambda n: Estimate(0.0, sd / math.sqrt(n), float(n - 1)).half_width() <= half_width)


def _first(holds) -> int | None:
  """The smallest number of seeds, two or more, at which what more seeds make true holds."""
  n = bisect.bisect_left(range(2, MOST_SEEDS + 1), True, key=holds) + 2
  return n if n <= MOST_SEEDS else None


def on_frontier(
  arms: Mapping[str, Estimate],
  sizes: Mapping[str, float],
  level: float,
  by_seed: Mapping[tuple[str, str], Estimate] = MappingProxyType({}),
) -> dict[str, str]:
  """'yes', 'no' or 'uncertain' for each arm: does no other with as few bytes have a lower loss?

  `by_seed` has arm - other of each (arm, other) that is paired, in one of the two orders.

  Every arm with rivals gets an equal part of `level`, so that no verdict is wrong with more than
  that chance. 'yes' says that the arm is better than each rival: each is tested at the whole part,
  for that claim is wrong only if a certain one of those tests is (intersection-union; Berger,
  Technometrics 24, 1982). 'no' says that some rival is better: the rivals share the part. An arm
  is either on the frontier or not, so it can go wrong in one of the two ways only.
  """
  size = np.array([sizes[arm] for arm in arms])
  mean, error, freedom = np.array(list(arms.values())).reshape(-1, 3).T
  rivals = (size[None, :] <= size[:, None]) & ~np.eye(len(arms), dtype=bool)
  part = level / max(1, int(np.any(rivals, axis=1).sum()))
  part_of_rival = part / np.maximum(1, rivals.sum(axis=1))[:, None]
  errors, freedoms = _welch(error[:, None], freedom[:, None], error[None, :], freedom[None, :])
  apart = mean[:, None] - mean[None, :]
  place = {arm: number for number, arm in enumerate(arms)}
  for (arm, other), d in by_seed.items():
    for i, j, sign in ((place[arm], place[other], 1), (place[other], place[arm], -1)):
      apart[i, j], errors[i, j], freedoms[i, j] = sign * d.mean, d.error, d.freedom
  known = freedoms > 0
  with np.errstate(invalid='ignore', divide='ignore'):
    t = np.nan_to_num(apart / errors, posinf=np.inf, neginf=-np.inf)
  chance = np.where(known, special.stdtr(np.where(known, freedoms, 1), t), 1)  # [i, j]: i below j
  better = np.all(~rivals | (chance <= part), axis=1)
  reverse = chance.T  # [i, j]: j below i
  worse = np.any(rivals & (reverse <= part_of_rival), axis=1)
  verdicts = np.where(worse, 'no', np.where(better, 'yes', 'uncertain'))
  return {arm: str(verdict) for arm, verdict in zip(arms, verdicts, strict=True)}


class SweetSpot(NamedTuple):
  arm: str | None  # the smallest arm shown to be within the margin; None: cannot be told
  undecided: tuple[str, ...]  # smaller ones of which the data cannot tell
  seeds_in_all: dict[str, int | None]  # that would settle each of those; None: no number
  level: float  # what each arm's bound may err with


def sweet_spot(
  arms: Mapping[str, Estimate],
  sizes: Mapping[str, float],
  reference: str,
  margin: float,
  level: float,
  by_seed: Mapping[str, Estimate] = MappingProxyType({}),
) -> SweetSpot:
  """The smallest cache whose loss is shown to be within `margin` nats of the reference's.

  `by_seed` has arm - reference of each arm for which that is paired.

  Within: the one-sided upper bound of the difference is at most the margin; not within: the lower
  bound is above it; else undecided, if the cache is smaller than the sweet spot's. The arms smaller
  than the reference share `level` in equal parts; an arm lies on one side of the margin, so its
  part covers both statements. Equal parts, not Holm's steps, so that the bounds themselves hold at
  once, for any margin. Not a fixed sequence from the largest cache down either: losses don't
  follow bytes, and the first arm that fails would block all below it. An arm of the reference's
  bytes saves nothing and is left out.
  """
  smaller = [arm for arm in arms if sizes[arm] < sizes[reference]]
  part = level / max(1, len(smaller))
  differences = {arm: by_seed.get(arm) or difference(arms[arm], arms[reference]) for arm in smaller}
  inside = [arm for arm, d in differences.items() if d.upper(part) <= margin]
  # Of equal bytes the best; the reference only if nothing is smaller.
  spot = min(inside or [reference], key=lambda arm: (sizes[arm], arms[arm].mean, arm))
  undecided = sorted(
    (
      arm
      for arm, d in differences.items()
      if d.lower(part) <= margin < d.upper(part) and sizes[arm] < sizes[spot]
    ),
    key=lambda arm: (sizes[arm], arm),
  )
  needed = {
    arm: seeds_needed(arms[arm], arms[reference], margin, part, by_seed.get(arm))
    for arm in undecided
  }
  found = None if spot == reference and undecided else spot
  return SweetSpot(found, tuple(undecided), needed, part)
