"""Intervals against scipy and simulated truth; the sweet spot and the frontier on plain cases."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mla.sweep import looks
from mla.sweep import statistics as stats

LEVEL = 0.05


def arm(*losses: float) -> stats.Estimate:
  return stats.estimate([float(loss) for loss in losses])


def test_the_interval_is_scipys():
  values = [1.21, 1.25, 1.22, 1.30]
  low, high = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
  found = stats.estimate(values)
  assert found.mean - found.half_width() == pytest.approx(low)
  assert found.mean + found.half_width() == pytest.approx(high)


@pytest.mark.parametrize('n', [2, 3, 6])
@pytest.mark.parametrize('ratio', [1, 4])
def test_a_difference_is_scipys_of_unequal_variances(n, ratio):
  rng = np.random.default_rng(n)
  a, b = rng.normal(1.2, 0.005, n), rng.normal(1.21, 0.005 * ratio, n)
  d = stats.difference(arm(*a), arm(*b))
  theirs = scipy_stats.ttest_ind(a, b, equal_var=False)
  interval = theirs.confidence_interval(0.95)
  assert d.freedom == pytest.approx(theirs.df)
  assert [d.mean - d.half_width(), d.mean + d.half_width()] == pytest.approx(list(interval))
  for side, bound in (('less', d.upper(0.01)), ('greater', d.lower(0.01))):
    one_sided = scipy_stats.ttest_ind(a, b, equal_var=False, alternative=side)
    ends = one_sided.confidence_interval(0.99)
    assert bound == pytest.approx(ends.high if side == 'less' else ends.low)


@pytest.mark.parametrize(
  'seeds, sds, correlation',
  [
    ((5, 5), (1, 1), 0.0),
    ((5, 5), (1, 3), 0.0),
    ((3, 6), (2, 1), 0.0),
    ((2, 5), (3, 1), 0.0),
    ((5, 5), (1, 1), 0.8),
  ],
)
def test_an_interval_of_a_difference_holds_the_truth_as_often_as_it_says(seeds, sds, correlation):
  """Where both arms share luck it does so more often, for the interval is too wide."""
  rng = np.random.default_rng(0)
  held, repeats = 0, 3000
  for _ in range(repeats):
    luck = rng.normal(0, 1, max(seeds))
    a, b = (
      sd * (math.sqrt(correlation) * luck[:n] + math.sqrt(1 - correlation) * rng.normal(0, 1, n))
      for n, sd in zip(seeds, sds, strict=True)
    )
    d = stats.difference(arm(*a), arm(*b))
    held += abs(d.mean) <= d.half_width()
  # Three standard errors of the simulation; with few and unequal seeds Welch's t is approximate.
  slack = 0.012 if seeds[0] == seeds[1] else 0.03
  assert held / repeats > 0.95 - slack


def test_two_seeds_that_agree_by_chance_do_not_pass_for_certain():
  """2 seeds that spread against 5 that don't: Satterthwaite alone errs 13 times too often here."""
  rng, level, repeats = np.random.default_rng(0), 0.001, 20_000
  a, b = rng.normal(0, 3, (repeats, 2)), rng.normal(0, 1, (repeats, 5))
  wrong = sum(
    stats.difference(arm(*x), arm(*y)).upper(level) < 0 for x, y in zip(a, b, strict=True)
  )
  assert wrong / repeats < 2.5 * level


def test_a_pair_that_agrees_by_chance_gains_nothing():
  """The pair whose losses differ by the same at every seed gets the interval of any other."""
  luck = np.array([0.004, -0.006, 0.001, 0.007, -0.006])
  a, b, shuffled = 1.2 + luck, 1.21 + luck, 1.21 + luck[[1, 0, 3, 4, 2]]
  together = stats.difference(arm(*a), arm(*b))
  assert together == pytest.approx(stats.difference(arm(*a), arm(*shuffled)))
  assert together.half_width() > 0.005


def test_the_mean_correlation_is_numpys():
  rng = np.random.default_rng(1)
  losses = rng.normal(1.2, 0.01, (4, 6))
  samples = [dict(enumerate(row)) for row in losses]
  mean, pairs, seeds = stats.mean_correlation(samples)
  assert mean == pytest.approx((np.corrcoef(losses).sum() - 4) / 12)
  assert (pairs, seeds) == (6, 6)
  assert stats.mean_correlation([{0: 1.0, 1: 2.0}, {0: 1.0, 1: 3.0}]) is None  # two seeds
  assert stats.mean_correlation([]) is None


def test_one_seed_gives_no_interval():
  one = stats.estimate([1.0])
  assert math.isinf(one.half_width())
  d = stats.difference(one, arm(1.2, 1.3))
  assert math.isinf(d.upper(LEVEL)) and math.isinf(d.half_width())


def test_seeds_needed_is_the_first_number_that_settles_it():
  a, b = arm(1.212, 1.216, 1.217), arm(1.195, 1.201, 1.204)
  needed = stats.seeds_needed(a, b, 0.02, 0.01)

  def bound(n: int) -> float:
    """As scipy has it, of samples with these means and standard deviations."""
    sds = [e.error * math.sqrt(3) for e in (a, b)]
    settled = scipy_stats.ttest_ind_from_stats(
      a.mean, sds[0], n, b.mean, sds[1], n, equal_var=False, alternative='less'
    )
    error = math.hypot(*sds) / math.sqrt(n)
    freedom = (n - 1) * sum(sd**2 for sd in sds) ** 2 / sum(sd**4 for sd in sds)
    found = a.mean - b.mean + scipy_stats.t.ppf(0.99, freedom) * error
    assert settled.statistic == pytest.approx((a.mean - b.mean) / error)
    return found

  assert bound(needed) <= 0.02 < bound(needed - 1)
  assert stats.seeds_needed(a, b, a.mean - b.mean, 0.01) is None
  assert stats.seeds_needed(arm(1.2), b, 0.02, 0.01) is None


def test_seeds_for_a_width():
  values = [1.20, 1.23, 1.21]
  needed = stats.seeds_for_width(stats.estimate(values), 0.01)

  def half_width(n: int) -> float:
    return scipy_stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)

  assert half_width(needed) <= 0.01 < half_width(needed - 1)


ARMS = {
  'large': arm(1.200, 1.202, 1.201),
  'good': arm(1.205, 1.206, 1.206),  # surely within 0.02
  'vague': arm(1.200, 1.230, 1.212),  # within it on the mean, not surely
  'bad': arm(1.300, 1.301, 1.302),
}
SIZES = {'large': 400.0, 'good': 200.0, 'vague': 100.0, 'bad': 50.0}


def spot_of(*names: str, sizes=SIZES, margin: float = 0.02) -> stats.SweetSpot:
  return stats.sweet_spot({name: ARMS[name] for name in names}, sizes, 'large', margin, LEVEL)


def test_the_sweet_spot_is_the_smallest_sure_one():
  spot = spot_of(*ARMS)
  assert spot.arm == 'good'
  assert spot.undecided == ('vague',)
  assert spot.seeds_in_all['vague'] > 3
  assert spot.level == pytest.approx(LEVEL / 3)


def test_an_undecided_arm_needs_more_seeds_than_it_has():
  rng = np.random.default_rng(0)
  undecided = 0
  for _ in range(300):
    arms = {
      'large': arm(*rng.normal(1.2, 0.005, 3)),
      'small': arm(*rng.normal(1.22, 0.01, 3)),
    }
    spot = stats.sweet_spot(arms, {'large': 2.0, 'small': 1.0}, 'large', 0.02, LEVEL)
    undecided += len(spot.undecided)
    assert all(seeds is None or seeds > 3 for seeds in spot.seeds_in_all.values())
  assert 0 < undecided < 300


def test_an_arm_of_the_references_bytes_saves_nothing():
  arms = {'large': ARMS['large'], 'twin': arm(1.1, 1.1, 1.1), 'vague': ARMS['vague']}
  sizes = {'large': 2.0, 'twin': 2.0, 'vague': 1.0}
  spot = stats.sweet_spot(arms, sizes, 'large', 0.02, LEVEL)
  assert spot.arm is None and spot.undecided == ('vague',)


def test_no_sweet_spot_is_not_the_same_as_unknown():
  assert spot_of('large', 'bad') == ('large', (), {}, LEVEL)
  unknown = spot_of('large', 'vague')
  assert unknown.arm is None and unknown.undecided == ('vague',)


def together(noise, more) -> tuple[stats.Estimate, stats.Estimate, stats.Estimate]:
  """Two arms that go up and down together, one behind by `more`; and their difference by seed."""
  ahead = dict(enumerate(noise))
  behind = {seed: loss + gap for (seed, loss), gap in zip(ahead.items(), more, strict=True)}
  return arm(*ahead.values()), arm(*behind.values()), stats.paired(behind, ahead)


def test_a_difference_by_seed_is_scipys_of_one_sample():
  more = (0.1, 0.101, 0.103)
  *_, d = together((1.0, 1.2, 1.35), more)
  interval = scipy_stats.ttest_1samp(more, 0).confidence_interval(0.95)
  assert [d.mean - d.half_width(), d.mean + d.half_width()] == pytest.approx(list(interval))


def test_verdicts_take_what_is_paired_by_seed():
  ahead, behind, d = together((1.0, 1.2, 1.35), (0.1, 0.101, 0.103))
  arms, sizes = {'ahead': ahead, 'behind': behind}, {'ahead': 1.0, 'behind': 2.0}
  assert stats.on_frontier(arms, sizes, LEVEL)['behind'] == 'uncertain'
  assert stats.on_frontier(arms, sizes, LEVEL, {('behind', 'ahead'): d})['behind'] == 'no'
  reverse = d._replace(mean=-d.mean)
  assert stats.on_frontier(arms, sizes, LEVEL, {('ahead', 'behind'): reverse})['behind'] == 'no'
  smaller = {'ahead': 2.0, 'behind': 1.0}
  assert stats.sweet_spot(arms, smaller, 'ahead', 0.11, LEVEL).undecided == ('behind',)
  assert stats.sweet_spot(arms, smaller, 'ahead', 0.11, LEVEL, {'behind': d}).arm == 'behind'
  undecided = stats.sweet_spot(arms, smaller, 'ahead', 0.1015, LEVEL, {'behind': d})
  needed = undecided.seeds_in_all['behind']
  sd = np.std((0.1, 0.101, 0.103), ddof=1)

  def bound(n: int) -> float:
    return scipy_stats.t.isf(LEVEL, n - 1) * sd / np.sqrt(n)

  assert bound(needed) <= 0.1015 - d.mean < bound(needed - 1)


def test_the_frontier():
  verdicts = stats.on_frontier(ARMS, SIZES, LEVEL)
  assert verdicts == {'large': 'uncertain', 'good': 'uncertain', 'vague': 'yes', 'bad': 'yes'}
  worse = {**ARMS, 'worse': arm(1.31, 1.311, 1.312)}
  assert stats.on_frontier(worse, {**SIZES, 'worse': 60.0}, LEVEL)['worse'] == 'no'
  one_seed = {**ARMS, 'lone': arm(1.9), 'same': arm(1.5, 1.5)}
  found = stats.on_frontier(one_seed, {**SIZES, 'lone': 60.0, 'same': 55.0}, LEVEL)
  assert found['lone'] == 'uncertain' and found['same'] == 'no'


def test_the_frontiers_verdicts_are_those_of_scipys_tests():
  rng = np.random.default_rng(2)
  losses = {f'a{i}': rng.normal(1.2 + 0.01 * (i % 4), 0.005, 4 + i % 2 * 0) for i in range(8)}
  sizes = {name: float(8 - i // 2) for i, name in enumerate(losses)}
  arms = {name: arm(*values) for name, values in losses.items()}
  found = stats.on_frontier(arms, sizes, LEVEL)
  part = LEVEL / 8  # the two smallest are each other's rivals, so all have some

  def chance(a: str, b: str) -> float:
    test = scipy_stats.ttest_ind(losses[a], losses[b], equal_var=False, alternative='less')
    return test.pvalue

  for name in losses:
    rivals = [r for r in losses if r != name and sizes[r] <= sizes[name]]
    worse = any(chance(r, name) <= part / len(rivals) for r in rivals)
    better = all(chance(name, r) <= part for r in rivals)
    assert found[name] == ('no' if worse else 'yes' if better else 'uncertain')
  assert len(set(found.values())) > 1


# Errors in all, simulated: arms that lie on the margin or beside each other, so that whatever is
# decided about them is as likely wrong as it can be.

LOOKS_AT = (2, 3, 4, 6, 8, 9)  # seeds


@pytest.fixture
def quick(monkeypatch):
  """Without the advice on further seeds, which takes most of the time and decides nothing."""
  monkeypatch.setattr(stats, 'seeds_needed', lambda *_: None)


def wrong_sweet_spots(level_of, repeats: int, arms: int) -> float:
  """How often some look shows an arm to be within the margin that is (just) not."""
  rng, wrong = np.random.default_rng(0), 0
  sizes = {'large': 100.0, **{f'a{i}': float(i) for i in range(arms)}}
  for _ in range(repeats):
    draws = {name: rng.normal(0.02 if name != 'large' else 0.0, 0.007, 9) for name in sizes}
    for number, seeds in enumerate(LOOKS_AT, 1):
      means = {name: arm(*losses[:seeds]) for name, losses in draws.items()}
      spot = stats.sweet_spot(means, sizes, 'large', 0.02 - 1e-9, level_of(number))
      if spot.arm not in (None, 'large'):
        wrong += 1
        break
  return wrong / repeats


def test_all_looks_together_err_as_often_as_one_may(quick):
  """Six looks at 5 % each would err some 13 % of the time; with what a look may spend, not."""
  repeats = 1500
  limit = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / repeats)
  assert wrong_sweet_spots(looks.level, repeats, arms=1) < limit
  assert wrong_sweet_spots(lambda number: LEVEL, repeats, arms=1) > limit


def test_all_arms_together_err_as_often_as_one_may(quick):
  repeats = 400
  limit = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / repeats)
  assert wrong_sweet_spots(looks.level, repeats, arms=8) < limit
  assert wrong_sweet_spots(lambda number: 8 * LEVEL / 2, repeats, arms=8) > limit


def test_what_looks_may_spend_is_five_percent_in_all():
  spent = [looks.level(number) for number in range(1, 200)]
  assert sum(spent) == pytest.approx(looks.TOTAL)
  assert spent == sorted(spent, reverse=True) and spent[-1] > 0


@pytest.mark.parametrize('apart', [0.0, 0.002])
def test_the_frontiers_verdicts_err_together_as_often_as_one_may(apart):
  """Arms alike: a 'no' is wrong for all. Arms a little worse the larger: a 'yes' is."""
  rng, repeats, wrong, of = np.random.default_rng(0), 1500, 0, 6
  sizes = {f'a{i}': float(i) for i in range(of)}
  for _ in range(repeats):
    arms = {
      name: arm(*rng.normal(1.2 + apart * i, 0.005 * (1 + i % 3), 4))
      for i, name in enumerate(sizes)
    }
    verdicts = stats.on_frontier(arms, sizes, LEVEL)
    false = {'a0'} if apart else set()  # it is on the frontier
    wrong += any(
      verdict == ('yes' if apart and name not in false else 'no')
      for name, verdict in verdicts.items()
    )
  assert wrong / repeats < LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / repeats)
