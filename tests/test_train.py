"""Training as a process that may die: what it leaves, and that it goes on exactly."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SHORT_RUN, mesh_of, tiny_config

import mla.train
from mla import metrics
from mla.checkpoint import Checkpoints
from mla.data.pipeline import load_data
from mla.errors import Diverged, MachineError, UserError
from mla.model import count_params, make_model
from mla.train import Ending, train_and_evaluate
from mla.workdir import LOCK, claim_workdir, read_config

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
  import mla.step

  finite = mla.step.mean_nll

  def nan_when_poisoned(model, tokens, *widths):
    return finite(model, tokens, *widths) * poison

  workdir, config = tmp_path / 'run', config_of(text)
  poison = 1.0
  monkeypatch.setattr(mla.step, 'mean_nll', nan_when_poisoned)

  def stop(step, evaluation):
    signal.raise_signal(signal.SIGTERM)

  assert not train_and_evaluate(config, workdir, report=stop)
  assert Checkpoints(workdir).steps() == [3, 6, 7]
  poison = float('nan')
  with pytest.raises(Diverged, match='step 8; the checkpoint of step 7 is kept'):
    train_and_evaluate(config, workdir)
  assert Checkpoints(workdir).steps() == [3, 6, 7]
  assert all(np.isfinite(line['loss']) for line in figures(workdir) if 'loss' in line)


# Nothing healthy is lost.


def tree(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.name != LOCK
  }


def lose_all(run: Path) -> None:
  for step in Checkpoints(run).steps():
    shutil.rmtree(run / 'checkpoints' / str(step))


def lose_the_folder(run: Path) -> None:
  shutil.rmtree(run / 'checkpoints')


def lose_all_of_an_older_run(run: Path) -> None:
  (run / '.saved').unlink()  # which older versions did not leave: their metrics tell
  lose_all(run)


def set_all_aside(run: Path) -> None:
  (run / '.saved').unlink()
  (run / 'checkpoints').rename(run / 'checkpoints-damaged')


@pytest.mark.parametrize(
  'lose', [lose_all, lose_the_folder, lose_all_of_an_older_run, set_all_aside]
)
def test_a_run_without_its_checkpoints_does_not_start_anew(text, copy, lose):
  lose(copy)
  before = tree(copy)
  for _ in range(2):
    with pytest.raises(UserError, match='checkpoints: .*start again with a new --workdir'):
      train_and_evaluate(config_of(text), copy)
    assert tree(copy) == before  # the metrics, too


def test_killed_before_its_first_checkpoint_a_run_starts_anew(text, trained, copy):
  (copy / '.saved').unlink()
  lose_all(copy)
  told = [line for line in metrics.read(copy / 'metrics.jsonl') if line['step'] <= 3]
  (copy / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in told))
  assert train_and_evaluate(config_of(text), copy)
  assert figures(copy) == figures(trained)


def test_a_changed_digit_in_config_json_trains_no_other_model(text, copy):
  path = copy / 'config.json'
  path.write_text(path.read_text().replace('"rope_base": 100.0', '"rope_base": 110.0'))
  before = tree(copy)
  for base in (100.0, 110.0):  # whichever of the two is asked for
    with pytest.raises(UserError, match=f'rope_base={base}'):
      train_and_evaluate(config_of(text, rope_base=base), copy)
  assert tree(copy) == before


@contextlib.contextmanager
def held(workdir: Path):
  """The lease in other hands."""
  with (workdir / LOCK).open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def test_two_do_not_train_in_one_workdir(text, trained, copy):
  shutil.rmtree(copy / 'checkpoints' / '12')
  before = tree(copy)
  with (
    held(copy),
    pytest.raises(UserError, match='--workdir=.*: another process is training there'),
  ):
    train_and_evaluate(config_of(text), copy)
  assert tree(copy) == before
  held_meanwhile = []

  def report(step, evaluation):
    with pytest.raises(BlockingIOError), held(copy):
      held_meanwhile.append(False)
    held_meanwhile.append(True)

  assert train_and_evaluate(config_of(text), copy, report=report)
  assert held_meanwhile == [True]
  with held(copy):
    pass
  assert figures(copy) == figures(trained)


@contextlib.contextmanager
def limited(kind: int, most: int):
  before = resource.getrlimit(kind)
  resource.setrlimit(kind, (most, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(kind, before)


@pytest.mark.parametrize(
  ('kind', 'most', 'said'),
  [
    (resource.RLIMIT_FSIZE, 6000, 'checkpoint 6 cannot be written: the limit on a file size'),
    (resource.RLIMIT_FSIZE, 10, 'the limit on a file size is reached; mend that'),
    (resource.RLIMIT_NOFILE, 3, 'checkpoint 6 cannot be written: the limit on open files'),
  ],
)
def test_what_the_machine_lacks_ends_in_one_line_and_the_run_goes_on(
  text, trained, tmp_path, kind, most, said
):
  run = tmp_path / 'run'
  with contextlib.ExitStack() as until_the_end:

    def report(step, evaluation):
      while not Checkpoints(run).steps():  # the one before is on its way
        time.sleep(0.01)
      used = len(os.listdir('/proc/self/fd')) if kind == resource.RLIMIT_NOFILE else 0
      until_the_end.enter_context(limited(kind, used + most))

    with pytest.raises(MachineError, match=said) as told:
      train_and_evaluate(config_of(text), run, report=report)
    assert '\n' not in str(told.value)
  began = time.monotonic()
  while any(  # Orbax' threads, which Python waits for at its end
    not thread.daemon and 'Signaling' in type(thread).__name__ for thread in threading.enumerate()
  ):
    assert time.monotonic() - began < 30, threading.enumerate()
    time.sleep(0.05)
  assert Checkpoints(run).steps() == [3]
  assert train_and_evaluate(config_of(text), run)
  assert figures(run) == figures(trained)


@pytest.mark.parametrize('name', ['run', 'run/checkpoints'])
def test_a_folder_that_vanishes_ends_in_one_line_and_the_run_goes_on(text, trained, tmp_path, name):
  run = tmp_path / 'run'

  def report(step, evaluation):
    (tmp_path / name).rename(tmp_path / 'gone')

  with pytest.raises(MachineError, match='checkpoints: the folder has gone.*put it back') as told:
    train_and_evaluate(config_of(text), run, report=report)
  assert '\n' not in str(told.value)
  assert not (tmp_path / name).exists()  # nothing is begun in its place
  (tmp_path / 'gone').rename(tmp_path / name)
  assert train_and_evaluate(config_of(text), run)
  assert figures(run) == figures(trained)


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
