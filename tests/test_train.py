"""Training as a process that may die: what it leaves, and that it goes on exactly."""

import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of
from short_runs import command, config_of, figures

import mla.train
from mla import metrics
from mla.checkpoint import Checkpoints
from mla.data.pipeline import load_data
from mla.errors import UserError
from mla.model import count_params, make_model
from mla.train import Ending, train_and_evaluate


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


def test_sigterm_and_ctrl_c_save_and_say_so(text, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  for step, number, name in ((33, signal.SIGTERM, 'SIGTERM'), (90, signal.SIGINT, 'Ctrl-C')):
    process = subprocess.Popen(
      long_command(text, workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(workdir, step, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert not err
    stopped_at = figures(workdir)[-1]['step']
    assert f'stopped by {name} at step {stopped_at}, saved' in out
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


@pytest.mark.parametrize('foreign', [True, False])
def test_a_folder_that_is_not_this_runs_is_refused_before_its_text_is_read(
  text, trained, tmp_path, monkeypatch, foreign
):
  import mla.train

  monkeypatch.setattr(mla.train, 'load_data', lambda *_: pytest.fail('the text is read'))
  (tmp_path / 'thesis.tex').write_text('ten years of work')
  workdir = tmp_path if foreign else trained
  with pytest.raises(UserError, match='is not empty' if foreign else 'seed=7: .* holds a run'):
    train_and_evaluate(config_of(text, seed=7), workdir)


@pytest.mark.parametrize('ending', [Ending.SIGTERM, Ending.CTRL_C])
def test_a_signal_before_the_first_step_is_not_lost(text, tmp_path, monkeypatch, ending):
  import mla.train

  def load_and_be_told(config, stopping):
    signal.raise_signal(ending.value)
    return load_data(config)

  before = signal.getsignal(ending.value)
  monkeypatch.setattr(mla.train, 'load_data', load_and_be_told)
  assert train_and_evaluate(config_of(text), tmp_path / 'run') is ending and not ending
  assert Checkpoints(tmp_path / 'run').steps() == [1]
  assert signal.getsignal(ending.value) == before


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert train_and_evaluate(config_of(text), workdir)
  return workdir


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
  assert set(training[0]) == {'step', 'loss', 'learning_rate', 'grad_norm', 'tokens_seen'}
  assert [line['tokens_seen'] for line in training] == [n * 8 * 16 for n in range(1, 13)]
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


def test_a_run_stopped_by_ctrl_c_goes_on_bit_for_bit(text, trained, tmp_path):
  def stop(step, evaluation):
    signal.raise_signal(signal.SIGINT)

  assert train_and_evaluate(config_of(text), tmp_path / 'run', report=stop) is Ending.CTRL_C
  assert Checkpoints(tmp_path / 'run').steps() == [3, 6, 7]
  assert train_and_evaluate(config_of(text), tmp_path / 'run')
  assert figures(tmp_path / 'run') == figures(trained)


def test_mfu_is_logged_where_the_peak_is_known_and_a_trace_names_its_steps(
  text, tmp_path, monkeypatch
):
  """6 a weight that multiplies, 6 a dim of queries and values and visible token, over the peak."""
  assert mla.train.targets.chip(jax.devices()[0].device_kind) is None
  chip = mla.train.targets.Chip(memory=None, flops=1e12, bandwidth=None, links=None)
  monkeypatch.setattr(mla.train.targets, 'chip', lambda kind: chip)
  config = config_of(text, num_steps=4, mesh={'data': 8, 'fsdp': 1, 'tensor': 1})
  assert train_and_evaluate(config, tmp_path, profile=1)
  (trace,) = (tmp_path / 'tensorboard' / 'plugins' / 'profile').glob('*/*.xplane.pb')
  assert b'training step' in trace.read_bytes()
  lines = [line for line in metrics.read(tmp_path / 'metrics.jsonl') if 'loss' in line]
  weights = count_params(make_model(config, 257))[1] + config.d_model * 257
  dims = config.head_dim + config.rope_dim + config.value_head_dim
  attention = 6 * config.num_layers * config.num_heads * dims * (config.seq_len + 1) / 2
  for line in lines:
    expected = (6 * weights + attention) * line['tokens_per_second'] / (8 * 1e12)
    assert line['mfu'] == pytest.approx(expected, rel=0.02)
  assert len(lines) == 4


def test_that_devices_share_weights_is_said_where_nobody_asked_for_it(text):
  config = config_of(text)
  data, model = load_data(config), make_model(config, 257)
  shared, alone = mesh_of((2, 4, 1)), mesh_of((8, 1, 1))
  assert 'mesh.fsdp=0: 4 devices share' in mla.train.describe(config, model, data, shared, 'new')
  assert 'share' not in mla.train.describe(config, model, data, alone, 'new')
  config.mesh = {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert 'share' not in mla.train.describe(config, model, data, shared, 'new')
