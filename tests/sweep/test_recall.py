"""Accuracy in a sweep's report: over which seeds, and against whom."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import faults
from scipy import stats
from sweeps import made_up_caches, made_up_probe, made_up_sweep

from mla import plots, probes
from mla.errors import UserError
from mla.sweep import frontier, page, recall, report, results


def lines(arm: str, size: float, accuracies) -> list[dict]:
  return [
    {
      'arm': arm, 'seed': seed, 'kv_cache_bytes_per_token': size, 'accuracy': accuracy,
      'bits_recalled': 100 * accuracy, 'probe': 'payload', 'records': 16, 'attributes': 4,
      'alphabet': 16, 'bits_held': 256.0,
    }
    for seed, accuracy in enumerate(accuracies, 1)
  ]  # fmt: skip


ARMS = {
  'mqa': lines('mqa', 32.0, [0.4, 0.5, 0.45]),
  'c4': lines('c4', 32.0, [0.3, 0.2, 0.25]),
  'c28': lines('c28', 128.0, [1.0, 0.99, 1.0]),
}


def test_means_and_the_best_of_as_many_bytes():
  found = recall.by_arm(ARMS, ARMS.keys(), 0.05)
  assert found['mqa']['mean_accuracy'] == pytest.approx(0.45)
  bits = [probes.Payload(16, 4, 16, 64).bits_recalled(share) for share in (0.3, 0.2, 0.25)]
  assert found['c4']['bits_recalled'] == pytest.approx(np.mean(bits))
  assert found['c4']['best_of_equal_bytes'] == 'mqa'
  assert found['mqa']['difference_at_equal_bytes'] is None
  ours, theirs = ([line['accuracy'] for line in ARMS[arm]] for arm in ('c4', 'mqa'))
  interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
  d, half = (found['c4'][f'{what}_at_equal_bytes'] for what in ('difference', 'half_width'))
  np.testing.assert_allclose([d - half, d + half], interval, rtol=1e-6)


def test_an_arm_that_is_not_fair_is_compared_with_nobody():
  found = recall.by_arm(ARMS, {'c4', 'c28'}, 0.05)  # some seed of mqa failed
  assert found['c4']['best_of_equal_bytes'] == 'c4' and found['c4']['pairs_at_equal_bytes'] == 0
  assert all(arm['difference_at_equal_bytes'] is None for arm in found.values())
  assert recall.by_arm(ARMS, set(), 0.05)['mqa']['best_of_equal_bytes'] is None


def test_lines_of_unlike_probes_or_of_text_are_of_none():
  every = [line for lines in ARMS.values() for line in lines]
  assert recall.probe_of(every) == {
    'task': 'payload', 'records': 16, 'attributes': 4, 'alphabet': 16, 'bits_held': 256.0,
    'guessing': 1 / 16,
  }  # fmt: skip
  assert recall.probe_of([*every, {**every[0], 'attributes': 8}]) is None
  assert recall.probe_of([*every, {'loss': 1.0}]) is None


def test_bits_are_counted_anew():
  """Older versions counted 87 in such windows, in which records have no order: 72."""
  new = {'probe': 'multikey', 'records': 8, 'attributes': 3, 'alphabet': 16, 'accuracy': 1.0}
  both = [{**new, 'bits_held': bits, 'bits_recalled': bits} for bits in (86.85, 71.55)]
  probe = recall.probe_of(both)
  assert probe is not None and probe['bits_held'] == pytest.approx(71.55, abs=0.01)
  sized = [
    {**line, 'seed': seed, 'kv_cache_bytes_per_token': 8.0} for seed, line in enumerate(both)
  ]
  found = recall.by_arm({'a': sized}, {'a'}, 0.05)
  assert found['a']['bits_recalled'] == probe['bits_held']


def test_a_summary_of_an_older_version_is_refused():
  old = {name: value for name, value in summary().items() if name != 'knobs'}
  with pytest.raises(UserError, match='report.py'):
    recall.claim([old])


def test_of_a_tie_the_first_name_is_the_best():
  """Sets have another order in each process; a report must not."""
  names = [f'arm-{number:02}' for number in range(20)]
  tied = {name: lines(name, 64.0, [1.0, 1.0, 1.0]) for name in reversed(names)}
  found = recall.by_arm(tied, set(names), 0.05)
  assert {arm['best_of_equal_bytes'] for arm in found.values()} == {'arm-00'}


def summary(bits_factor: int = 1) -> dict:
  found = recall.by_arm(ARMS, ARMS.keys(), 0.05)
  probe = recall.probe_of(ARMS['mqa'])
  assert probe is not None
  return {
    'probe': {**probe, 'bits_held': probe['bits_held'] * bits_factor},
    'knobs': [['c4', 'c28']],
    'arms': [
      {
        'arm': arm,
        'attention': 'mqa' if arm == 'mqa' else 'mla',
        'latent_dim': None if arm == 'mqa' else int(arm[1:]),
        'kv_cache_bytes_per_token': of[0]['kv_cache_bytes_per_token'],
        'recall': found[arm],
      }
      for arm, of in ARMS.items()
    ],
  }


def test_the_knee_is_half_way_from_guessing():
  size = recall.knee(summary())
  share = (0.5 + 0.5 / 16 - 0.25) / (299 / 300 - 0.25)
  assert size == pytest.approx(32 * 4**share, rel=0.01)
  assert 'at about 54 bytes' in recall.claim([summary()])


@pytest.mark.parametrize(
  'arm, told', [('c4', 'at none of these sizes'), ('c28', 'below all of these sizes')]
)
def test_where_all_are_on_one_side_the_claim_says_on_which(arm, told):
  assert told in recall.claim([{**summary(), 'knobs': [[arm]]}])


def test_the_knee_is_of_one_knob():
  """A nested run's widths and separate runs of other widths are no points of one line."""
  found = summary()
  others = [{**arm, 'arm': f'n@{arm["arm"]}'} for arm in found['arms'] if arm['latent_dim']]
  for arm, size in zip(others, (30.0, 34.0), strict=True):
    arm['kv_cache_bytes_per_token'] = size
  both = {**found, 'arms': [*found['arms'], *others]}
  both['knobs'] = [*found['knobs'], [arm['arm'] for arm in others]]
  assert recall.knee(both) == recall.knee(found)


@pytest.mark.parametrize('draw', [plots.recall, plots.knees])
def test_pictures_have_no_overlapping_text(draw):
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  draw(figure, [summary(), summary(2)], 'What is claimed')
  assert not faults(figure)


FULL, SMALL = [0.8, 0.7, 0.9], [0.79, 0.7, 0.88]
BOTH = made_up_caches(FULL, SMALL)


def test_what_another_cache_costs_is_told_of_the_same_weights():
  (row,) = recall.through(BOTH, 'int8')
  assert row['arm'] == 'c8' and row['trials'] == 3
  assert row['bytes'] == {'bfloat16': 48.0, 'int8': 40.0}
  assert row['accuracy'] == pytest.approx({'bfloat16': np.mean(FULL), 'int8': np.mean(SMALL)})
  interval = stats.ttest_rel(SMALL, FULL).confidence_interval(0.95)
  d, half = row['difference'], row['half_width']
  np.testing.assert_allclose([d - half, d + half], interval, rtol=1e-6)
  (alone,) = recall.through([run for run in BOTH if run['workdir'].endswith('=0')], 'int8')
  assert alone['half_width'] is None
  better = {**row, 'arm': 'c9', 'difference': 0.1}
  assert recall.cost({'copy': [better], 'payload': [better, row]}) == (
    'Through int8 the mean accuracy of an arm changes by -0.0100 at worst (c8, payload)'
  )
  with pytest.raises(UserError, match='c8: was not read through int8 and bfloat16 alike'):
    recall.through(BOTH[:-1], 'int8')


def test_arms_are_told_apart_by_all_that_names_them():
  """By fields with commas between, and by the width of a nested latent, of which each has a row."""
  named = [
    {**run, 'workdir': f'trials/attention=mla,latent_dim={c},learning_rate=0.1,seed={seed}'}
    for c in (4, 16)
    for seed in (0, 1)
    for run in (BOTH[0], BOTH[3])
  ]
  assert {row['arm']: row['trials'] for row in recall.through(named, 'int8')} == {
    'attention=mla,latent_dim=4': 2,
    'attention=mla,latent_dim=16': 2,
  }
  nested = [{**run, 'latent_dim': width} for width in (8, 4) for run in BOTH]
  assert {row['arm']: row['trials'] for row in recall.through(nested, 'int8')} == {
    'c8@4': 3,
    'c8@8': 3,
  }


def test_the_picture_of_two_caches_has_no_overlapping_text():
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  rows = recall.through(BOTH, 'int8')
  plots.caches(figure, {'payload': rows, 'multikey': rows}, 'What is claimed')
  assert not faults(figure)


def test_a_report_tells_accuracy_beside_loss(tmp_path):
  folder = made_up_probe(tmp_path)
  told = report.write(folder)
  assert 'payload: 16 records of 4 values of 16' in (folder / 'report.md').read_text()
  (row,) = (row for row in told.split('accuracy')[1].splitlines() if row.startswith('c4 '))
  assert row.split()[1:3] == ['8', '0.8990']
  page.write(folder, {})
  assert 'accuracy' in (folder / page.NAME).read_text()
  summary = frontier.summarise(folder)
  assert summary['arms'][0]['mean_bits_per_byte'] is None
  mixed = tmp_path / 'mixed'
  mixed.mkdir()
  made_up_probe(mixed)
  results.Results(mixed).add({**results.read_lines(mixed / 'results.jsonl')[0], 'attributes': 8})
  assert 'probe' not in frontier.summarise(mixed) and report.write(mixed)
  (tmp_path / 'text').mkdir()
  assert 'probe' not in frontier.summarise(made_up_sweep(tmp_path / 'text'))
