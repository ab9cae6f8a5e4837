"""Runs that the sweep did not train, as arms of its report."""

import os
from pathlib import Path

import pytest
from conftest import tiny_config
from sweeps import fake_line, made_up_sweep

from mla.convert import compress
from mla.errors import UserError
from mla.evaluate import score_run
from mla.sweep import frontier, joined, page, report, results, trials
from mla.sweep.run import lease_sweep
from mla.train import train_and_evaluate

FIELDS = {'num_layers': 1, 'num_steps': 4, 'eval_every': 4, 'checkpoint_every': 4}


def config_of(text: Path):
  return tiny_config('mha', data__files=str(text), data__eval_tokens=128, **FIELDS)


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
  """A run and links to it, what compression made of it, one that began with its weights, one on
  other text."""
  root = tmp_path_factory.mktemp('runs')
  other = root / 'other.txt'
  other.write_text(text.read_text().upper())
  for name, files, first in (('mha', text, None), ('again', text, 'mha'), ('upper', other, None)):
    train_and_evaluate(config_of(files), root / name, init_from=first and root / first)
  (root / 'elsewhere').mkdir()
  os.symlink(root / 'mha', root / 'elsewhere' / 'gqa')
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
  assert 'mha-c8: the sweep did not train it; how it was trained is not compared' in text
  assert 'learning rate tried' not in text and 'training costs' not in text
  page.write(folder, {})
  assert 'python train.py' not in (folder / page.NAME).read_text()  # which would train another
  arms = {arm['arm']: arm for arm in frontier.summarise(folder)['arms']}
  assert arms.keys() == {'mha', 'mha-c8'}
  assert arms['mha-c8']['attention'] == 'mla' and arms['mha-c8']['latent_dim'] == 8
  assert arms['mha-c8']['kv_cache_bytes_per_token'] < arms['mha']['kv_cache_bytes_per_token']


def test_weights_stand_there_once(runs, tmp_path):
  joined.join(tmp_path / 'new', runs / 'mha')
  with pytest.raises(UserError, match='mha-link: its weights stand there already, as mha'):
    joined.join(tmp_path / 'new', runs / 'mha-link')
  joined.join(tmp_path / 'new', runs / 'again')  # of the same config
  first, again = results.read_lines(tmp_path / 'new' / 'results.jsonl')
  assert first['loss'] != again['loss']


def sweep_of(folder: Path, text: Path) -> list[trials.Trial]:
  """A sweep of one arm, whose line is made up but for its text."""
  config = config_of(text)
  found = trials.expand(config, {'gqa': {'num_kv_heads': 2}}, [trials.parse_axis('seed=0,1')])
  for trial, line in zip(found, trials.check(found, folder), strict=True):
    made_up = fake_line(trial, {'gqa': trial.learning_rate}) | {'kv_cache_bytes_per_token': 8.0}
    results.Results(folder).add({**made_up, **line})
  return found


def test_a_run_stands_beside_a_sweeps_arms(runs, text, tmp_path):
  sweep_of(tmp_path, text)
  before = results.read_lines(tmp_path / 'results.jsonl')
  line = joined.join(tmp_path, runs / 'mha')
  assert (
    line['tokens_evaluated']
    == score_run(runs / 'mha', 'bfloat16', max_tokens=128)[0]['tokens_evaluated']
  )
  assert results.read_lines(tmp_path / 'results.jsonl') == [*before, line]
  assert '| mha |' in told(tmp_path)
  summary = frontier.summarise(tmp_path)
  assert summary['reference'] == 'gqa'  # though mha's cache is larger


def test_what_cannot_stand_there_is_refused_and_changes_nothing(runs, text, tmp_path):
  folder = tmp_path / 'sweep'
  folder.mkdir()
  sweep_of(folder, text)
  before = (folder / 'results.jsonl').read_bytes()
  with pytest.raises(UserError, match='--run=.*/gone: no run there'):
    joined.join(folder, runs / 'gone')
  with pytest.raises(UserError, match='the sweep has another arm gqa; rename the folder'):
    joined.join(folder, runs / 'elsewhere' / 'gqa')
  with pytest.raises(UserError, match='--run=.*upper: did not read the text of trial gqa'):
    joined.join(folder, runs / 'upper')
  with pytest.raises(UserError, match='is not empty and holds no sweep'):
    joined.join(runs, runs / 'mha')
  with lease_sweep(folder), pytest.raises(UserError, match='another sweep is at work'):
    joined.join(folder, runs / 'mha')
  assert (folder / 'results.jsonl').read_bytes() == before
  old = made_up_sweep(tmp_path)  # whose lines tell no text
  with pytest.raises(UserError, match='do not say which text they are of'):
    joined.join(old, runs / 'again')


def test_a_sweep_does_not_take_a_joined_run_for_its_own(runs, text, tmp_path):
  joined.join(tmp_path, runs / 'elsewhere' / 'gqa')
  (trial,) = trials.expand(config_of(text), {'gqa': {}}, [])
  with pytest.raises(UserError, match='a run of that name that the sweep did not train'):
    results.Results(tmp_path).settle([trial])
