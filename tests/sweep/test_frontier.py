"""From results to verdicts: which seeds judge, what a failure costs, how looks are counted."""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mla import paths
from mla.errors import UserError
from mla.sweep import frontier, report, sections, tuning

PUBLISHED = Path(__file__).parent.parent.parent / 'results' / 'frontier'
RATE = 0.003


def line(arm: str, seed: int, loss: float | None, rate: float = RATE, size: float = 8.0) -> dict:
  """A trial's result; it failed where `loss` is None."""
  name = f'{arm},learning_rate={rate:g},seed={seed}'
  found = {
    'trial': name,
    'arm': arm,
    'seed': seed,
    'learning_rate': rate,
    'fields': {'attention': 'mla', 'seed': seed},
    'digest': name,
    'arm_digest': arm,
  }
  if loss is None:
    return {**found, 'status': 'failed', 'error': 'the loss is no longer finite'}
  return {
    **found,
    'status': 'done',
    'loss': loss,
    'attention': 'mla',
    'latent_dim': int(size),
    'kv_cache_bytes_per_token': size,
    'params_total': 1,
    'params_non_embedding': 1,
    'bits_per_byte': loss,
    'tokens_per_second': 1.0,
    'tokens_evaluated': 4,
    'cache_dtype': 'bfloat16',
  }


def seeds_of(arm: str, *losses: float | None, size: float = 8.0) -> list[dict]:
  return [line(arm, seed, loss, size=size) for seed, loss in enumerate(losses)]


def stored(folder: Path, lines: list[dict]) -> Path:
  folder.mkdir(exist_ok=True)
  (folder / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder


def arms_of(folder: Path, lines: list[dict], **flags) -> dict[str, dict]:
  summary = frontier.summarise(stored(folder, lines), **flags)
  return {arm['arm']: arm for arm in summary['arms']}


# Which seeds judge.


def test_the_seed_that_chose_the_rate_does_not_judge(tmp_path):
  lines = [line('a', 0, loss, rate) for rate, loss in ((1e-3, 1.9), (2e-3, 1.0), (4e-3, 1.8))]
  lines += [line('a', 1, 1.2, 2e-3), line('a', 2, 1.3, 2e-3)]
  arm = arms_of(tmp_path, lines)['a']
  assert (arm['learning_rate'], arm['tuning_seed'], arm['seeds']) == (2e-3, 0, 2)
  assert arm['losses'] == {'1': 1.2, '2': 1.3}
  assert arm['mean_loss'] == pytest.approx(1.25)


def test_all_rates_with_all_seeds_judge_like_tuning_on_the_first(tmp_path):
  """A rate that is better with the judging seeds only has not been chosen by them."""
  both = [line('a', s, loss, 2e-3) for s, loss in enumerate((1.0, 1.3, 1.3))]
  others = [line('a', s, loss, 4e-3) for s, loss in enumerate((1.1, 1.0, 1.0))]
  whole = arms_of(tmp_path / 'whole', both + others)['a']
  assert (whole['learning_rate'], whole['losses']) == (2e-3, {'1': 1.3, '2': 1.3})
  assert arms_of(tmp_path / 'tuned', both + others[:1])['a']['losses'] == whole['losses']


def test_an_arm_with_one_rate_has_tuned_nothing(tmp_path):
  arm = arms_of(tmp_path, seeds_of('a', 1.0, 1.1, 1.2))['a']
  assert (arm['tuning_seed'], arm['seeds']) == (None, 3)


def test_an_arm_tuned_on_itself_is_shown_and_decides_nothing(tmp_path):
  small = [line('small', 0, 1.0, rate, size=4.0) for rate in (1e-3, 2e-3)]
  lines = small + seeds_of('large', 1.200, 1.201, 1.202)
  summary = frontier.summarise(stored(tmp_path, lines))
  arm = summary['arms'][0]
  assert arm['tuned_on_itself'] and arm['mean_loss'] == 1.0 and arm['half_width'] is None
  assert arm['on_frontier'] == 'uncertain'
  assert summary['sweet_spot']['arm'] is None and summary['sweet_spot']['undecided'] == ('small',)
  assert any(w.startswith('small: tuned on itself') for w in report.warnings(summary))
  assert '1.0000*' in report.written(summary)


@pytest.mark.parametrize('worst', [1.0, None])
def test_equal_losses_or_failures_are_decided_by_the_rate_and_not_the_order(worst):
  """With two infinite means, too, the lower rate is taken, whichever flag came first."""
  rates = {2e-3: {0: 1.0}, 1e-3: {0: 1.0}, 4e-3: {0: 1.1}}
  assert tuning.judge(rates).rate == tuning.judge(dict(reversed(rates.items()))).rate == 1e-3
  lines = [line('a', 0, worst, rate) for rate in (2e-3, 1e-3)]
  lines += [line('a', 1, 1.0, rate) for rate in (2e-3, 1e-3)]
  chosen = {tuning.judge(tuning.by_arm(found)['a']).rate for found in (lines, lines[::-1])}
  assert chosen == {1e-3}


def test_the_order_of_results_plays_no_part(tmp_path):
  lines = [
    json.loads(text) for text in (PUBLISHED / 'results.jsonl').read_text().strip().split('\n')
  ]
  expected = frontier.summarise(stored(tmp_path / 'a', lines))
  random.Random(0).shuffle(lines)
  assert frontier.summarise(stored(tmp_path / 'b', lines)) == expected


# What a failure costs.


def test_a_failed_seed_keeps_an_arm_off_the_frontier_and_from_the_sweet_spot(tmp_path):
  """Its other seeds are the best there are, and of the smallest cache."""
  lines = seeds_of('frail', 1.0, 1.0001, None, 1.0002, size=2.0)
  lines += seeds_of('small', 1.205, 1.206, 1.205, 1.206, size=4.0)
  lines += seeds_of('large', 1.200, 1.201, 1.202, 1.201)
  summary = frontier.summarise(stored(tmp_path, lines))
  frail, small, _ = summary['arms']
  assert frail['failed_seeds'] == [2] and frail['on_frontier'] == 'no'
  assert frail['mean_loss'] == pytest.approx(1.0001) and frail['difference'] is None
  assert small['on_frontier'] == 'yes'  # nothing that works is as small
  assert summary['sweet_spot']['arm'] == 'small' and not summary['sweet_spot']['undecided']
  row = next(text for text in report.written(summary).splitlines() if '| frail |' in text)
  assert '3 of 4' in row and '1.0001*' in row
  assert any(w.startswith('frail: 3 of 4 seeds finished') for w in report.warnings(summary))


def test_a_reference_that_fails_leaves_no_sweet_spot(tmp_path):
  lines = seeds_of('small', 1.2, 1.201, 1.2, size=4.0) + seeds_of('large', 1.2, None, 1.2)
  summary = frontier.summarise(stored(tmp_path, lines), reference='large')
  assert summary['sweet_spot']['arm'] is None
  assert 'none, for seeds of the reference large failed' in report.written(summary)
  json.dumps(summary, allow_nan=False)
  assert frontier.summarise(tmp_path)['reference'] == 'small'  # one that has a mean


def test_where_every_rate_failed_on_some_seed_there_is_a_report(tmp_path):
  """Which ended in an IndexError."""
  lines = [line('a', 0, 1.0, 1e-3), line('a', 0, None, 2e-3)]
  lines += [line('a', 1, None, 1e-3), line('a', 1, 1.1, 2e-3)]
  lines += [line('dead', seed, None, rate) for seed in (0, 1) for rate in (1e-3, 2e-3)]
  stored(tmp_path, lines)
  told = report.write(tmp_path)
  summary = json.loads((tmp_path / 'frontier.json').read_text())
  assert summary['failed_arms'] == ['dead'] and 'dead: none of its trials finished' in told
  (arm,) = summary['arms']
  assert arm['failed_seeds'] == [1] and arm['tuned_on_itself']
  assert '| 0 of 1 |' in (tmp_path / 'report.md').read_text()


def test_a_seed_with_which_nothing_finished_cannot_choose_and_counts_as_failed():
  rates = {1e-3: {0: math.inf, 1: 1.0, 2: 1.2}, 2e-3: {0: math.inf, 1: 1.1, 2: 1.0}}
  found = tuning.judge(rates)
  assert (found.rate, found.tuning_seed, found.losses, found.failed) == (1e-3, 1, {2: 1.2}, [0])


# What the figures are.


def test_differences_are_welchs_over_the_judged_seeds(tmp_path):
  rng = np.random.default_rng(0)
  losses = {name: rng.normal(1.2, 0.01, 4).tolist() for name in ('s8', 's4', 's2')}
  lines = [row for name in losses for row in seeds_of(name, *losses[name], size=float(name[1:]))]
  summary = frontier.summarise(stored(tmp_path, lines))
  by_name = {arm['arm']: arm for arm in summary['arms']}

  def test_of(arm: str, other: str, **kind):
    return scipy_stats.ttest_ind(losses[arm], losses[other], equal_var=False, **kind)

  for name in ('s4', 's2'):
    d = by_name[name]['difference']
    assert d['ci95'] == pytest.approx(list(test_of(name, 's8').confidence_interval(0.95)))
    one_sided = test_of(name, 's8', alternative='less').confidence_interval(1 - 0.01 / 2)
    assert d['one_sided_upper_95_simultaneous'] == pytest.approx(one_sided.high)
  step = by_name['s4']['difference_to_smaller_latent']['ci95_simultaneous']
  assert step == pytest.approx(list(test_of('s4', 's2').confidence_interval(1 - 0.01 / 2)))
  assert by_name['s4']['smaller_latent'] == 's2' and by_name['s2']['smaller_latent'] is None


def test_one_sided_and_two_sided_say_so(tmp_path):
  """Every head and every sentence with 95 % in it names its kind."""
  summary = frontier.summarise(PUBLISHED)
  heads, _ = sections.frontier_rows(summary)
  tables = [text for text in report.written(summary).splitlines() if text.startswith('| ')]
  cells = [cell for table in tables for cell in table.split('|') if '95 %' in cell]
  assert len(cells) >= 6
  *_, below = report.frontier_table(summary).splitlines()
  for text in [*heads, *cells, report.verdict(summary), *below.split('. ')]:
    assert '95 %' not in text or 'one-sided' in text or 'two-sided' in text, text


def test_an_interval_over_two_seeds_is_warned_of(tmp_path):
  lines = seeds_of('two', 1.2, 1.3, size=4.0) + seeds_of('large', 1.2, 1.21, 1.22)
  summary = frontier.summarise(stored(tmp_path, lines))
  assert any(
    'an interval over two seeds' in warning and warning.endswith(': two')
    for warning in report.warnings(summary)
  )


def test_an_arm_that_chose_its_own_seed_is_the_best_of_nothing(tmp_path):
  lines = seeds_of('a', 1.2, 1.21, 1.19) + seeds_of('b', 1.4, 1.41, 1.39)
  lines += [line('lucky', 0, 1.1), line('lucky', 0, 1.3, 1e-2)]
  arms = arms_of(tmp_path, lines)
  assert arms['lucky']['tuned_on_itself']
  assert {arm['best_of_equal_bytes'] for arm in arms.values()} == {'a'}
  assert arms['b']['difference_at_equal_bytes']['mean'] == pytest.approx(0.2)


def test_arms_that_have_not_seen_equally_many_tokens_are_warned_of(tmp_path):
  lines = seeds_of('large', 1.2, 1.21, 1.22) + seeds_of('long', 1.1, 1.11, 1.12)
  equal = report.warnings(frontier.summarise(stored(tmp_path, lines)))
  assert not any('num_steps' in warning for warning in equal)
  for line in lines[3:]:
    line['fields'] = {**line['fields'], 'num_steps': 1600}
  told = report.warnings(frontier.summarise(stored(tmp_path, lines)))
  assert any('num_steps differs between arms (long 1600)' in warning for warning in told)


def test_a_report_needs_no_costs(tmp_path):
  lines = seeds_of('large', 1.2, 1.21, 1.22) + seeds_of('small', 1.2, 1.21, 1.3, size=4.0)
  lines += seeds_of('lone', 1.2, size=2.0)
  report.write(stored(tmp_path, lines))
  (arm, *_) = json.loads((tmp_path / 'frontier.json').read_text())['arms']
  assert arm['flops_per_token'] is None and arm['training_memory'] is None
  assert arm['half_width'] is None  # one seed; and what is infinite is no JSON
  assert '| lone | 1 | - | - | 1 |' in (tmp_path / 'report.md').read_text()


def test_three_hundred_arms_take_a_second(tmp_path):
  rng = np.random.default_rng(0)
  lines = [
    line(f'a{arm}', seed, rng.normal(1.2 + 0.1 / (1 + arm), 0.01), size=float(1 + arm // 2))
    for arm in range(300)
    for seed in range(3)
  ]
  stored(tmp_path, lines)
  np.savez(tmp_path / 'windows.npz', **{row['trial']: np.ones(64) for row in lines})
  began = time.process_time()
  summary = frontier.summarise(tmp_path)
  assert time.process_time() - began < 3
  assert len(summary['arms']) == 300


# Looks.


def test_a_report_over_further_seeds_is_a_further_look(tmp_path):
  def look(*losses: float, **flags) -> dict:
    lines = seeds_of('small', *losses, size=4.0) + seeds_of('large', *losses)
    report.write(stored(tmp_path, lines), **flags)
    return json.loads((tmp_path / 'frontier.json').read_text())

  first, again = look(1.2, 1.21, 1.22), look(1.2, 1.21, 1.22)
  assert first == again and (first['look'], len(first['looks'])) == (1, 1)
  assert look(1.2, 1.21, 1.22, margin=0.5)['look'] == 1  # bounds hold for every margin
  assert look(1.2, 1.21, 1.22, 1.20)['look'] == 2
  assert look(1.2, 1.21, 1.22, 1.20, reference='small')['look'] == 3
  last = [look(*[1.2, 1.21, 1.22] * 2, *[1.2] * more) for more in range(4)][-1]
  assert last['look'] == 7 and last['look_level'] == pytest.approx(0.01 / 8)
  parts = last['sweet_spot']['level'], first['sweet_spot']['level']
  assert parts[0] < parts[1]
  text = (tmp_path / 'report.md').read_text()
  assert 'look 7' in text and 'after 3, 4, 4, 6, 7, 8, 9 seeds' in text


def test_summarising_alone_is_no_look(tmp_path):
  stored(tmp_path, seeds_of('a', 1.2, 1.3))
  frontier.summarise(tmp_path)
  assert not (tmp_path / 'looks.json').exists()


@pytest.mark.parametrize('text', ['[', '{}', '[3]', '[{"seeds": ["a"], "trials": 1}]', '"x"'])
def test_a_damaged_list_of_looks_is_refused_and_kept(text, tmp_path):
  stored(tmp_path, seeds_of('a', 1.2, 1.3))
  (tmp_path / 'looks.json').write_text(text)
  with pytest.raises(UserError, match=r'looks\.json.*take it from a copy') as refused:
    report.write(tmp_path)
  assert '\n' not in str(refused.value)
  assert (tmp_path / 'looks.json').read_text() == text
  assert not (tmp_path / 'report.md').exists()


def test_no_output_takes_the_place_of_what_a_report_leaves(tmp_path):
  """Nor of what it will leave: looks.json, once gone, would count looks anew."""
  stored(tmp_path, seeds_of('a', 1.2, 1.3))
  for _ in range(2):
    for name in ('looks.json', 'frontier.json', 'report.md', 'results.jsonl'):
      with pytest.raises(UserError, match=r'is a name of the run or sweep'):
        paths.output('json', str(tmp_path / name), 'runs')
    report.write(tmp_path)


def latents(bounds: dict[int, tuple[float, float] | None], steps: dict[int, tuple[float, float]]):
  """A summary of latents with these bounds against the reference, and steps from the narrower."""
  widths = sorted(bounds)
  return {
    'margin': 0.02,
    'reference': 'mha',
    'arms': [
      {
        'arm': f'c{width}',
        'latent_dim': width,
        'failed_seeds': [],
        'kv_cache_bytes_per_token': float(width),
        'difference': bounds[width]
        and {
          'one_sided_lower_95_simultaneous': bounds[width][0],
          'one_sided_upper_95_simultaneous': bounds[width][1],
        },
        'smaller_latent': f'c{smaller}' if smaller else None,
        'difference_to_smaller_latent': {'ci95_simultaneous': list(steps[width])}
        if width in steps
        else None,
      }
      for smaller, width in zip([0, *widths], widths, strict=False)
    ],
  }


def test_the_narrowest_latent_is_told_by_bounds_and_steps():
  bounds = {4: (0.03, 0.05), 8: (0.01, 0.03), 16: (-0.01, 0.02), 32: None}
  told = sections.narrowest(latents(bounds, {8: (-0.03, -0.01), 16: (-0.02, 0.01)}))
  assert 'within 0.02 nats of mha: C = 16; shown not to be: C = 4; undecided: C = 8 (' in told
  assert 'a gain is shown from C = 4 to C = 8 (' in told and 'loss is shown' not in told
  told = sections.narrowest(latents({4: (0.0, 0.1), 8: (0.0, 0.1)}, {8: (0.01, 0.02)}))
  assert 'no latent; shown not to be: none; undecided: C = 4 and C = 8' in told
  assert 'a loss is shown from C = 4 to C = 8' in told
  told = sections.narrowest(latents({4: (0.0, 0.1), 8: (0.0, 0.1)}, {8: (-0.01, 0.02)}))
  assert 'none is shown to matter' in told
  assert 'cannot be told' in sections.narrowest(latents({4: None}, {}))
