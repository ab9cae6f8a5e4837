"""Runs that the sweep did not train, as arms of its report."""

import os

import pytest
from conftest import tiny_config
from sweeps import made_up_sweep

from mla.convert import compress
from mla.errors import UserError
from mla.evaluate import score_run
from mla.sweep import frontier, joined, page, report, results
from mla.train import train_and_evaluate

FIELDS = {'num_layers': 1, 'num_steps': 4, 'eval_every': 4, 'checkpoint_every': 4}


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
  """A run, a link to it, what compression made of it, a run that began with its weights; and one on
  other text."""
  root = tmp_path_factory.mktemp('runs')
  other = root / 'other.txt'
  other.write_text(text.read_text().upper())
  for name, files, first in (('mha', text, None), ('again', text, 'mha'), ('upper', other, None)):
    config = tiny_config('mha', data__files=str(files), data__eval_tokens=128, **FIELDS)
    train_and_evaluate(config, root / name, init_from=first and root / first)
  os.symlink(root / 'mha', root / 'mha-link')
  compress.compress(root / 'mha', root / 'mha-c8', latent_dim=8, rope_dim=None, method='svd')
  return root


def told(folder) -> str:
  report.write(folder)
  return (folder / 'report.md').read_text()


def test_runs_make_a_report_of_their_own(runs, tmp_path):
  folder = tmp_path / 'new'
  for name in ('mha', 'mha-c8', 'mha'):  # again: in place of its earlier line
    line = joined.join(folder, runs / name)
    figures, nll = score_run(runs / name, 'bfloat16', max_tokens=128)
    assert line['loss'] == pytest.approx(nll.sum() / figures['tokens_evaluated'], abs=1e-6)
  text = told(folder)
  assert 'mha-c8: what its training costs is not known (the sweep did not train it)' in text
  page.write(folder, {})
  arms = {arm['arm']: arm for arm in frontier.summarise(folder)['arms']}
  assert arms.keys() == {'mha', 'mha-c8'}
  assert arms['mha-c8']['attention'] == 'mla' and arms['mha-c8']['latent_dim'] == 8
  assert arms['mha-c8']['kv_cache_bytes_per_token'] < arms['mha']['kv_cache_bytes_per_token']


def test_other_weights_of_one_config_are_another_arm(runs, tmp_path):
  for name in ('mha', 'again', 'mha-link'):  # the last is the first, by another name
    joined.join(tmp_path / 'new', runs / name)
  first, again, link = results.read_lines(tmp_path / 'new' / 'results.jsonl')
  assert first['digest'] == link['digest'] != again['digest']
  assert first['loss'] != again['loss']


def test_a_run_stands_beside_a_sweeps_arms(runs, tmp_path):
  folder = made_up_sweep(tmp_path)
  before = results.read_lines(folder / 'results.jsonl')
  joined.join(folder, runs / 'mha-c8')
  assert results.read_lines(folder / 'results.jsonl')[:-1] == before
  assert '| mha-c8 |' in told(folder)


def test_what_cannot_stand_there_is_refused_and_changes_nothing(runs, tmp_path):
  folder = made_up_sweep(tmp_path)  # whose first arm is called mha
  before = (folder / 'results.jsonl').read_bytes()
  with pytest.raises(UserError, match='the sweep has an arm mha of its own; rename the folder'):
    joined.join(folder, runs / 'mha')
  with pytest.raises(UserError, match='--run=.*/gone: no run there'):
    joined.join(folder, runs / 'gone')
  with pytest.raises(UserError, match='is not empty and holds no sweep'):
    joined.join(runs, runs / 'mha')
  assert (folder / 'results.jsonl').read_bytes() == before
  new = tmp_path / 'new'
  joined.join(new, runs / 'mha')
  with pytest.raises(UserError, match=r'--run=.*upper: did not read the text of trial mha'):
    joined.join(new, runs / 'upper')
  assert len(results.read_lines(new / 'results.jsonl')) == 1
