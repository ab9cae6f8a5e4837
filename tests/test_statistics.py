"""Intervals against scipy and simulated truth; the sweet spot and the frontier on plain cases."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mla import statistics as stats


def sample(*losses: float) -> dict[int, float]:
  return dict(enumerate(losses))


def test_the_interval_is_scipys():
  values = [1.21, 1.25, 1.22, 1.30]
  found = stats.estimate(values)
  low, high = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
  assert (found.low, found.high) == pytest.approx((low, high))


def test_the_paired_difference_is_scipys():
  a, b = sample(1.21, 1.25, 1.22), sample(1.19, 1.20, 1.21)
  d = stats.difference(a, b)
  theirs = scipy_stats.ttest_rel(list(a.values()), list(b.values()))
  interval = theirs.confidence_interval(0.95)
  assert (d.low, d.high) == pytest.approx((interval.low, interval.high))


def test_the_interval_holds_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  draws = rng.normal(1.2, 0.004, (4000, 3))
  held = np.mean(
    [stats.estimate(list(d)).low <= 1.2 <= stats.estimate(list(d)).high for d in draws]
  )
  assert held == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_only_shared_seeds_are_paired():
  assert stats.difference({0: 2.0, 1: 5.0}, {0: 1.0, 2: 9.0}).mean == 1.0
  assert stats.difference({0: 2.0}, {1: 1.0}) is None


def test_one_seed_gives_no_interval():
  assert math.isinf(stats.estimate([1.0]).half_width)
  assert math.isinf(stats.upper_bound(stats.estimate([1.0])))


def test_seeds_needed_is_the_first_number_that_settles_it():
  d = stats.Estimate(mean=0.015, sd=0.006, half_width=0.01, seeds=3)
  needed = stats.seeds_needed(d, 0.02)

  def bound(n: int) -> float:
    return stats.upper_bound(d._replace(seeds=n))

  assert bound(needed) <= 0.02 < bound(needed - 1)
  assert stats.seeds_needed(d, 0.015) is None
  assert stats.seeds_needed(d, 0.010) == needed  # to see that it lies outside takes as many


def test_seeds_for_a_width():
  e = stats.estimate([1.20, 1.23, 1.21])
  needed = stats.seeds_for_width(e, 0.01)

  def half_width(n: int) -> float:
    return scipy_stats.t.ppf(0.975, n - 1) * e.sd / math.sqrt(n)

  assert half_width(needed) <= 0.01 < half_width(needed - 1)


LOSSES = {
  'large': sample(1.200, 1.202, 1.201),
  'good': sample(1.205, 1.206, 1.206),  # surely within 0.02
  'vague': sample(1.200, 1.230, 1.212),  # within it on the mean, not surely
  'bad': sample(1.300, 1.301, 1.302),
}
SIZES = {'large': 400.0, 'good': 200.0, 'vague': 100.0, 'bad': 50.0}


def test_the_sweet_spot_is_the_smallest_sure_one():
  spot = stats.sweet_spot(LOSSES, SIZES, 'large', 0.02)
  assert spot.arm == 'good'
  assert spot.undecided == ('vague',)
  assert spot.seeds_in_all['vague'] > 3


def test_an_undecided_arm_needs_more_seeds_than_it_has():
  rng = np.random.default_rng(0)
  undecided = 0
  for _ in range(300):
    losses = {
      'large': sample(*rng.normal(1.2, 0.005, 3)),
      'small': sample(*rng.normal(1.22, 0.01, 3)),
    }
    spot = stats.sweet_spot(losses, {'large': 2.0, 'small': 1.0}, 'large', 0.02)
    undecided += len(spot.undecided)
    assert all(seeds is None or seeds > 3 for seeds in spot.seeds_in_all.values())
  assert 0 < undecided < 300


def test_an_arm_of_the_references_bytes_saves_nothing():
  losses = {'large': LOSSES['large'], 'twin': sample(1.1, 1.1, 1.1), 'vague': LOSSES['vague']}
  spot = stats.sweet_spot(losses, {'large': 2.0, 'twin': 2.0, 'vague': 1.0}, 'large', 0.02)
  assert spot.arm is None and spot.undecided == ('vague',)


def test_no_sweet_spot_is_not_the_same_as_unknown():
  none = stats.sweet_spot({k: LOSSES[k] for k in ('large', 'bad')}, SIZES, 'large', 0.02)
  assert none == ('large', (), {})
  unknown = stats.sweet_spot({k: LOSSES[k] for k in ('large', 'vague')}, SIZES, 'large', 0.02)
  assert unknown.arm is None and unknown.undecided == ('vague',)


def test_the_frontier():
  verdicts = stats.on_frontier(LOSSES, SIZES)
  assert verdicts == {'large': 'uncertain', 'good': 'uncertain', 'vague': 'yes', 'bad': 'yes'}
  worse = {**LOSSES, 'worse': sample(1.31, 1.311, 1.312)}
  assert stats.on_frontier(worse, {**SIZES, 'worse': 60.0})['worse'] == 'no'
