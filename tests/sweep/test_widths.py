"""A nested trial's widths are arms beside the others, all of them from one run."""

import json

import numpy as np
import pytest
import test_frontier
from scipy import stats

from mla.errors import UserError
from mla.sweep import frontier, sections, widths
from mla.sweep import run as sweep
from mla.sweep.page.contents import contents

PREFIX = dict.fromkeys((*widths.FIGURES, 'bits_per_byte'), 1.0)


def nested(seed: int, loss: float, rate: float = test_frontier.RATE) -> dict:
  """A trial of latent 8, and what it is cut to 4 and 2: 0.1 and 0.3 behind."""
  line = test_frontier.line('nested', seed, loss, rate=rate)
  cuts = ((4, loss + 0.1), (2, loss + 0.3))
  prefixes = [
    {**PREFIX, 'latent_dim': width, 'kv_cache_bytes_per_token': float(width), 'loss': cut}
    for width, cut in cuts
  ]
  return {**line, 'prefixes': prefixes}


def summarise(folder, lines, **how):
  return frontier.summarise(test_frontier.stored(folder, lines), **how)


def test_each_width_is_an_arm_of_its_own_bytes(tmp_path):
  lines = [nested(0, 1.0), nested(1, 1.02), *test_frontier.seeds_of('c4', 1.1, 1.3, size=4.0)]
  summary = summarise(tmp_path, lines, reference='nested')
  arms = {arm['arm']: arm for arm in summary['arms']}
  assert list(arms) == ['nested@2', 'nested@4', 'c4', 'nested']
  assert [arms[name]['mean_loss'] for name in arms] == pytest.approx([1.31, 1.11, 1.2, 1.01])
  assert [arms[name]['latent_dim'] for name in arms] == [2, 4, 4, 8]
  assert [arms[name]['kv_cache_bytes_per_token'] for name in arms] == [2, 4, 4, 8]
  assert {name: arm.get('prefix_of') for name, arm in arms.items()} == {
    'nested@2': 'nested',
    'nested@4': 'nested',
    'c4': None,
    'nested': None,
  }
  # What is compared: the same bytes, and the steps within the run.
  assert arms['c4']['best_of_equal_bytes'] == 'nested@4'
  assert arms['nested']['smaller_latent'] == 'nested@4'
  assert arms['nested@4']['smaller_latent'] == 'nested@2'
  assert arms['c4']['smaller_latent'] is None and summary['latent_steps'] == 2
  compute = next(t for t in sections.tables(summary) if t.title == 'Training compute')
  assert [row[0] for row in compute.rows] == ['c4', 'nested']


def test_widths_of_one_run_are_compared_seed_by_seed(tmp_path):
  """Their losses move together: as independent samples they could hardly ever be told apart."""
  lines = [nested(0, 1.0), nested(1, 1.2), nested(2, 1.35)]
  behind = (0.1, 0.101, 0.103)
  for line, more in zip(lines, behind, strict=True):
    line['prefixes'][0]['loss'] = line['loss'] + more
  alone = test_frontier.seeds_of('c4', 1.1, 1.3, 1.2, size=4.0)
  summary = summarise(tmp_path, [*lines, *alone], reference='nested')
  arms = {arm['arm']: arm for arm in summary['arms']}
  wanted = stats.ttest_1samp(behind, 0).confidence_interval(0.95)
  assert arms['nested@4']['difference']['ci95'] == pytest.approx(list(wanted))
  (mean, half) = (-np.mean(behind), stats.sem(behind) * stats.t.isf(0.01 / 2 / 2, 2))
  found = arms['nested']['difference_to_smaller_latent']['ci95_simultaneous']
  assert found == pytest.approx([mean - half, mean + half])
  assert summary['correlation']['pairs'] == 1  # of what was trained, not of its widths


def test_verdicts_take_widths_of_one_run_seed_by_seed(tmp_path):
  lines = [nested(0, 1.0), nested(1, 1.2), nested(2, 1.35)]
  for line, more in zip(lines, (0.1, 0.101, 0.103), strict=True):
    line['prefixes'][0]['loss'] = line['loss'] - more  # the prefix is the better one
  summary = summarise(tmp_path, lines, reference='nested', margin=0.0)
  verdicts = {arm['arm']: arm['on_frontier'] for arm in summary['arms']}
  assert verdicts['nested'] == 'no' and verdicts['nested@4'] == 'yes'
  assert summary['sweet_spot']['arm'] == 'nested@4'
  assert frontier.sweet_spot_at(summary, 0.0) == summary['sweet_spot']


def test_a_prefix_has_not_what_it_does_not_tell(tmp_path):
  """The whole's accuracy is not its prefix's; of an older line nothing may be made up."""
  line = {**nested(0, 1.0), 'accuracy': 0.9, 'bits_per_byte': None}
  for prefix in line['prefixes']:
    del prefix['bits_per_byte']
  _, *prefixes = widths.by_width([line])
  assert prefixes and all('accuracy' not in prefix for prefix in prefixes)
  failed = {**line, 'status': 'failed', 'error': 'no memory', 'loss': None, 'accuracy': None}
  _, *prefixes = widths.by_width([failed])
  assert [prefix['status'] for prefix in prefixes] == ['failed', 'failed']
  assert not any(name in prefix for prefix in prefixes for name in widths.FIGURES[1:])


def test_a_prefix_is_shown_with_its_runs(tmp_path):
  lines = [nested(0, 1.0), nested(1, 1.02)]
  shown = contents(tmp_path, summarise(tmp_path, lines), lines, {})
  told = {arm['arm']: arm for arm in shown['arms']}
  assert told['nested@2']['curves'] == told['nested']['curves']
  assert all('no line is here' not in str(arm) for arm in told.values())


def test_one_run_has_one_learning_rate(tmp_path):
  """The whole's; a prefix alone would have taken the other, with which no second seed ran."""
  other = nested(0, 1.01, rate=0.01)
  other['prefixes'][1]['loss'] = 1.0
  summary = summarise(tmp_path, [nested(0, 1.0), other, nested(1, 1.02)])
  assert {arm['learning_rate'] for arm in summary['arms']} == {test_frontier.RATE}
  assert {tuple(arm['losses']) for arm in summary['arms']} == {('1',)}


def test_a_seed_that_failed_failed_at_every_width(tmp_path):
  lines = [nested(0, 1.0), nested(1, 1.02), test_frontier.line('nested', 2, None)]
  summary = summarise(tmp_path, lines)
  assert [arm['failed_seeds'] for arm in summary['arms']] == [[2]] * 3
  assert len(summary['failed']) == 1


@pytest.mark.parametrize(
  'prefixes', [[{}], 'none', [{**PREFIX, 'loss': float('nan')}], [{**PREFIX, 'loss': 'low'}]]
)
def test_a_line_of_other_prefixes_is_refused(tmp_path, prefixes):
  lines = [{**nested(0, 1.0), 'prefixes': prefixes}]
  with pytest.raises(UserError, match='line 1 has prefixes that lack a number'):
    summarise(tmp_path, lines)


def test_each_widths_windows_are_kept(tmp_path):
  line = nested(0, 1.0)
  for prefix in line['prefixes']:
    prefix['window_nll'] = [prefix['loss'], 2.0]
  sweep.Results(tmp_path).add({**line, 'window_nll': [1.0, 2.0]})
  with np.load(tmp_path / 'windows.npz') as windows:
    assert {name: windows[name][0] for name in windows} == {
      line['trial']: 1.0,
      f'{line["trial"]}@4': np.float32(1.1),
      f'{line["trial"]}@2': np.float32(1.3),
    }
  (stored,) = [json.loads(raw) for raw in (tmp_path / 'results.jsonl').read_text().splitlines()]
  assert [set(prefix) for prefix in stored['prefixes']] == [set(PREFIX)] * 2
