"""Damage, loss, refusal and lack: nothing healthy is lost, and the run goes on or says why."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from short_runs import config_of, figures

import mla.train
from mla import metrics
from mla.checkpoint import Checkpoints
from mla.errors import Diverged, MachineError, UserError
from mla.train import train_and_evaluate
from mla.workdir import LOCK, claim_workdir, read_config


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert train_and_evaluate(config_of(text), workdir)
  return workdir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
  return Path(shutil.copytree(trained, tmp_path / 'copy'))


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
