"""Training as a process that may die: what it leaves, and that it goes on exactly."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHORT_RUN, tiny_config

from mla import metrics
from mla.checkpoint import Checkpoints
from mla.data.pipeline import load_data
from mla.errors import Diverged, UserError
from mla.train import train_and_evaluate
from mla.workdir import claim_workdir, read_config

ROOT = Path(__file__).parent.parent
FIELDS = {
  **SHORT_RUN,
  'log_every': 1,
  'eval_every': 6,
  'checkpoint_every': 3,
}


def config_of(text: Path, **changes):
  config = tiny_config('mla')
  config.update_from_flattened_dict({**FIELDS, 'data.files': str(text)})
  config.update(changes)
  return config


def command(text: Path, workdir: Path, **changes) -> list[str]:
  arm = {'latent_dim': 8, 'rope_dim': 4, 'num_heads': 2, 'head_dim': 6, 'batch_size': 8}
  fields = {**FIELDS, **arm, 'data.files': text, **changes}
  return [
    *(sys.executable, str(ROOT / 'train.py'), f'--config={ROOT}/configs/mla_small.py'),
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]


def run(*args) -> subprocess.CompletedProcess:
  return subprocess.run(command(*args), capture_output=True, text=True, timeout=300)


def figures(workdir: Path) -> list[dict]:
  """Every line of metrics.jsonl, less what the clock decides."""
  lines = metrics.read(workdir / 'metrics.jsonl')
  return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline and process.poll() is None:
    path = workdir / 'metrics.jsonl'
    if path.exists() and any(line['step'] >= step for line in metrics.read(path)):
      return
    time.sleep(0.05)
  raise AssertionError(f'step {step} never came: {process.communicate()}')


@pytest.fixture(scope='module')
def undisturbed(text, tmp_path_factory) -> Path:
  """A run of 200 steps that nothing happens to."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  done = subprocess.run(long_command(text, workdir), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return workdir


def long_command(text: Path, workdir: Path) -> list[str]:
  return [
    *command(text, workdir),
    *('--config.num_steps=200', '--config.checkpoint_every=20', '--config.eval_every=100'),
  ]


def test_after_sigkill_a_run_goes_on_bit_for_bit(text, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  for step in (1, 70, 130):  # before the first checkpoint, and twice between two
    process = subprocess.Popen(
      long_command(text, workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(workdir, step, process)
    process.kill()
    process.communicate()
  killed_at = figures(workdir)[-1]['step']
  done = subprocess.run(long_command(text, workdir), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert killed_at < 200
  assert 'from step' in done.stdout
  assert figures(workdir) == figures(undisturbed)
  again = subprocess.run(long_command(text, workdir), capture_output=True, text=True)
  assert again.returncode == 0
  assert 'already trained to step 200 of 200' in again.stdout


def test_sigterm_saves_and_says_so(text, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  process = subprocess.Popen(
    long_command(text, workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  wait_for_step(workdir, 33, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=100)
  assert process.returncode == 143, err
  stopped_at = figures(workdir)[-1]['step']
  assert f'stopped by SIGTERM at step {stopped_at}, saved' in out
  assert (workdir / 'checkpoints' / str(stopped_at)).is_dir()
  done = subprocess.run(long_command(text, workdir), capture_output=True, text=True)
  assert f'from step {stopped_at}' in done.stdout
  assert figures(workdir) == figures(undisturbed)


def test_killed_in_an_evaluation_it_makes_up_for_it(text, trained, tmp_path, monkeypatch):
  import mla.train

  class Killed(BaseException):
    pass

  def killed(*_):
    time.sleep(1)  # a checkpoint that was begun before would be whole now
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(mla.train, 'evaluate', killed)
    with pytest.raises(Killed):
      train_and_evaluate(config_of(text), tmp_path / 'run')
  assert train_and_evaluate(config_of(text), tmp_path / 'run')
  assert figures(tmp_path / 'run') == figures(trained)


def test_sigterm_before_the_first_step_is_not_lost(text, tmp_path, monkeypatch):
  import mla.train

  def load_and_be_told(config):
    signal.raise_signal(signal.SIGTERM)
    return load_data(config)

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(mla.train, 'load_data', load_and_be_told)
  assert not train_and_evaluate(config_of(text), tmp_path / 'run')
  assert Checkpoints(tmp_path / 'run').steps() == [1]
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert train_and_evaluate(config_of(text), workdir)
  return workdir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
  return Path(shutil.copytree(trained, tmp_path / 'copy'))


def test_what_a_run_leaves(trained):
  assert {path.name for path in trained.iterdir()} == {
    *('config.json', 'metrics.jsonl', 'checkpoints', 'tensorboard', '.lock', '.saved'),
  }
  assert Checkpoints(trained).steps() == [6, 9, 12]  # three are kept
  lines = figures(trained)
  training = [line for line in lines if 'loss' in line]
  evaluations = [line for line in lines if 'eval_loss' in line]
  assert [line['step'] for line in training] == list(range(1, 13))
  assert [line['step'] for line in evaluations] == [6, 12]
  assert set(training[0]) == {'step', 'loss', 'learning_rate', 'grad_norm'}
  assert set(evaluations[0]) == {'step', 'eval_loss', 'eval_bits_per_byte'}
  assert any((trained / 'tensorboard').iterdir())
  # A byte tokenizer on text without document starts: nats a token are nats a byte.
  for line in evaluations:
    assert line['eval_bits_per_byte'] == pytest.approx(line['eval_loss'] / np.log(2), rel=1e-6)


def test_it_learns(text, tmp_path):
  reports = []
  config = config_of(text, num_steps=60, learning_rate=1e-2, eval_every=30)
  train_and_evaluate(config, tmp_path / 'run', report=lambda step, values: reports.append(values))
  losses = [line['loss'] for line in figures(tmp_path / 'run') if 'loss' in line]
  assert losses[-1] < losses[0] - 1.5
  assert reports[-1]['eval_loss'] < reports[0]['eval_loss']


def damage_truncate(checkpoint: Path) -> None:
  for path in checkpoint.rglob('*'):
    if path.is_file() and path.stat().st_size > 100:
      os.truncate(path, path.stat().st_size // 2)


def damage_flip(checkpoint: Path) -> None:
  for path in (checkpoint / 'params').rglob('*'):
    if path.is_file() and path.stat().st_size > 100:
      raw = bytearray(path.read_bytes())
      raw[len(raw) // 2] ^= 0xFF
      path.write_bytes(raw)


def damage_remove(checkpoint: Path) -> None:
  shutil.rmtree(checkpoint / 'training')


@pytest.mark.parametrize('damage', [damage_truncate, damage_flip, damage_remove])
def test_a_damaged_newest_checkpoint_falls_back(text, trained, copy, damage, caplog):
  damage(copy / 'checkpoints' / '12')
  assert train_and_evaluate(config_of(text), copy)
  assert 'checkpoint 12 is damaged' in caplog.text
  assert (copy / 'checkpoints-damaged' / '12').is_dir()
  assert Checkpoints(copy).steps() == [6, 9, 12]
  assert figures(copy) == figures(trained)


def test_all_checkpoints_damaged_is_an_error(text, copy):
  for step in (6, 9, 12):
    damage_remove(copy / 'checkpoints' / str(step))
  with pytest.raises(UserError, match='every checkpoint is damaged'):
    train_and_evaluate(config_of(text), copy)


def test_an_interrupted_save_is_ignored(text, trained, copy):
  (copy / 'checkpoints' / '15.orbax-checkpoint-tmp').mkdir()
  with (copy / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 13, "lo')
  shutil.rmtree(copy / 'checkpoints' / '12')
  assert train_and_evaluate(config_of(text), copy)
  assert figures(copy) == figures(trained)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'latent_dim': 16}, 'latent_dim=16: .* latent_dim=14'),
    ({'learning_rate': 0.1}, 'learning_rate=0.1'),
    ({'num_steps': 24}, 'num_steps=24'),
    ({'seed': 5}, 'seed=5'),
  ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(text, copy, changes, named):
  before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
  with pytest.raises(UserError, match=named):
    train_and_evaluate(config_of(text, **changes), copy)
  assert {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()} == before


def test_where_it_computes_and_what_it_writes_may_change(text, copy):
  changes = {'log_every': 2, 'remat': 'full', 'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}}
  shutil.rmtree(copy / 'checkpoints' / '12')
  assert train_and_evaluate(config_of(text, **changes), copy)


def test_another_text_is_refused(text, copy, tmp_path):
  config = config_of(text)
  path = copy / 'config.json'
  other = tmp_path / 'other.txt'
  other.write_text(text.read_text().replace('beer', 'milk'))
  path.write_text(path.read_text().replace(str(text), str(other)))
  config.data.files = str(other)
  with pytest.raises(UserError, match='data: .* another text'):
    train_and_evaluate(config, copy)


def test_an_evaluation_without_a_finite_loss_is_divergence(text, tmp_path, monkeypatch):
  import mla.train

  monkeypatch.setattr(mla.train, 'evaluate', lambda *_: {'eval_loss': float('nan')})
  with pytest.raises(Diverged, match='step 3; no checkpoint yet'):
    train_and_evaluate(config_of(text, eval_every=3, checkpoint_every=6), tmp_path / 'run')


def test_a_workdir_whose_claim_was_interrupted_is_free(text, tmp_path):
  (tmp_path / '.0123456789abcdef.draft').write_text('{"attention": ')
  claim_workdir(config_of(text), tmp_path)
  assert read_config(tmp_path).attention == config_of(text).attention


def test_divergence_stops_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
  import mla.train

  finite = mla.train.token_nll

  def nan_when_poisoned(model, tokens):
    return finite(model, tokens) * poison

  workdir, config = tmp_path / 'run', config_of(text)
  poison = 1.0
  monkeypatch.setattr(mla.train, 'token_nll', nan_when_poisoned)

  def stop(step, evaluation):
    signal.raise_signal(signal.SIGTERM)

  assert not train_and_evaluate(config, workdir, report=stop)
  assert Checkpoints(workdir).steps() == [3, 6, 7]
  poison = float('nan')
  with pytest.raises(Diverged, match='step 8; the checkpoint of step 7 is kept'):
    train_and_evaluate(config, workdir)
  assert Checkpoints(workdir).steps() == [3, 6, 7]
  assert all(np.isfinite(line['loss']) for line in figures(workdir) if 'loss' in line)
