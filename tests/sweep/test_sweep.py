"""A sweep as a process that may die: what it leaves, what it skips, and what it refuses."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SHORT_RUN, tiny_config
from sweeps import fake_line

from mla.errors import UserError
from mla.signals import CAUGHT, StopSignal
from mla.sweep import frontier, report, trials, tuning
from mla.sweep import run as sweep

ROOT = Path(__file__).parent.parent.parent
FIELDS = {
  **SHORT_RUN,
  'num_heads': 2,
  'head_dim': 6,
  'rope_dim': 4,
  'batch_size': 2,
  'log_every': 4,
  'eval_every': 12,
  'checkpoint_every': 4,
}


def run(folder: Path, text: Path, *flags: str, **changes) -> subprocess.CompletedProcess:
  return subprocess.run(command(folder, text, *flags, **changes), capture_output=True, text=True)


def command(folder: Path, text: Path, *flags: str, **changes) -> list[str]:
  fields = {**FIELDS, 'data.files': text, **changes}
  return [
    *(sys.executable, str(ROOT / 'sweep.py'), f'--config={ROOT}/configs/mla_small.py'),
    f'--workdir={folder}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
    *flags,
  ]


AXES = ('--sweep=latent_dim=4,8', '--sweep=seed=0,1')


def losses(folder: Path) -> dict[str, float]:
  lines = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
  return {line['trial']: line['loss'] for line in lines if line['status'] == 'done'}


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory) -> Path:
  """An undisturbed sweep of 2 x 2 trials."""
  folder = tmp_path_factory.mktemp('sweep') / 'done'
  done = run(folder, text, *AXES)
  assert done.returncode == 0, done.stderr
  return folder


def test_a_sweep_leaves_its_answer(finished):
  assert len(losses(finished)) == 4
  summary = json.loads((finished / 'frontier.json').read_text())
  assert [arm['arm'] for arm in summary['arms']] == ['latent_dim=4', 'latent_dim=8']
  for arm in summary['arms']:
    assert arm['kv_cache_bytes_per_token'] == 2 * (arm['latent_dim'] + FIELDS['rope_dim'])
    assert arm['seeds'] == 2 and arm['ci95'][0] < arm['mean_loss'] < arm['ci95'][1]
    assert {'params_total', 'learning_rate', 'flops_per_token'} <= arm.keys()
  assert (finished / 'frontier.png').read_bytes().startswith(b'\x89PNG')
  assert 'Sweet spot' in (finished / 'report.md').read_text()


@pytest.mark.parametrize('axes', [AXES, AXES[::-1]])
def test_a_finished_sweep_trains_nothing_and_ends_soon(axes, finished, text):
  before, began = losses(finished), time.monotonic()
  again = run(finished, text, *axes)
  assert time.monotonic() - began < 60  # 5 s on a quiet machine
  assert again.returncode == 0
  assert again.stdout.count('all 4 trials were done already; nothing') == 1
  assert losses(finished) == before


def test_a_line_that_was_taken_out_is_scored_again(finished, text, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(finished, folder)
  lines = (folder / 'results.jsonl').read_text().splitlines(keepends=True)
  (folder / 'results.jsonl').write_text(''.join(lines[1:]))
  (folder / 'windows.npz').unlink()
  again = run(folder, text, *AXES)
  assert again.returncode == 0 and '3 of 4 trials are done already' in again.stdout
  log = folder / 'logs' / f'{json.loads(lines[0])["trial"]}.txt'
  assert 'already trained to step 12' in log.read_text()
  assert losses(folder) == losses(finished)


def test_further_seeds_are_added(finished, text, tmp_path):
  folder = tmp_path / 'copy'
  subprocess.run(['cp', '-r', finished, folder], check=True)
  again = run(folder, text, '--sweep=latent_dim=4,8', '--sweep=seed=0,1,2')
  assert '4 of 6 trials are done already' in again.stdout
  assert len(losses(folder)) == 6
  assert losses(finished).items() <= losses(folder).items()


def test_a_damaged_list_of_looks_is_refused_before_anything_trains(finished, text, tmp_path):
  folder = Path(shutil.copytree(finished, tmp_path / 'copy'))
  (folder / 'looks.json').write_text('[{"seeds": ')
  refused = run(folder, text, '--sweep=seed=7')
  assert refused.returncode == 2 and 'looks.json' in refused.stderr
  assert refused.stderr.count('\n') == 1
  assert losses(folder) == losses(finished)


def test_killed_in_mid_trial_it_ends_as_if_undisturbed(finished, text, tmp_path):
  folder = tmp_path / 'killed'
  with subprocess.Popen(command(folder, text, *AXES), stdout=subprocess.DEVNULL) as process:
    saved = folder / 'trials' / 'latent_dim=4,seed=1' / 'checkpoints' / '4'
    while not saved.exists():
      assert process.poll() is None
      time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
  assert len(losses(folder)) < 4
  assert run(folder, text, *AXES).returncode == 0
  log = (folder / 'logs' / 'latent_dim=4,seed=1.txt').read_text()
  assert 'from step' in log, 'it ended before it was killed'
  assert losses(folder) == losses(finished)


def test_a_failed_trial_ends_no_other(text, tmp_path):
  rates = '--sweep=learning_rate=1e30,1e-3'
  done = run(tmp_path / 'sweep', text, rates)
  assert done.returncode == 1
  assert 'FAILED' in done.stdout and 'no longer finite' in done.stdout
  assert list(losses(tmp_path / 'sweep')) == ['learning_rate=0.001']
  summary = json.loads((tmp_path / 'sweep' / 'frontier.json').read_text())
  assert summary['failed'][0]['trial'] == 'learning_rate=1e+30'
  assert Path(tmp_path / 'sweep' / 'report.md').read_text().count('learning_rate=1e+30')


@pytest.mark.parametrize(
  'flags, named',
  [
    (['--sweep=latent_dims=4'], 'latent_dims'),
    (['--sweep=latent_dim=4,big'], 'trial latent_dim=big'),
    (['--sweep=latent_dim=4,0'], 'trial latent_dim=0'),
    (['--sweep=mesh.data=-1,3'], 'trial mesh.data=3: mesh'),
    (['--sweep=seq_len=16,100000'], 'trial seq_len=100000: batch_size'),
    (['--sweep=ffn_dim,param_budget=0:1000'], 'trial ffn_dim=0,param_budget=1000'),
    (['--sweep=seed=1', '--arms=nowhere.py'], '--arms=nowhere.py'),
    (['--sweep=seed=1', '--address=auto'], '--address=auto'),
    (['--sweep=seed=1', '--slice=TPU-V4:2x2x2'], '--slice=TPU-V4:2x2x2: is for --engine=ray'),
    (['--sweep=seed=1', '--engine=ray', '--slice=TPU-V4:2x2x2'], '--resources=TPU=4'),
    (['--sweep=seed=1', '--engine=ray', '--slice=v4', '--resources=TPU=4'], '--slice=v4'),
    (['--sweep=seed=1', '--engine=ray', '--resources=CPU=-1'], '--resources=CPU=-1: each'),
    (['--sweep=seed=1', '--reference=mah'], '--reference=mah'),
    (['--sweep=seed=1', '--margin=inf'], '--margin=inf'),
    ([], '--sweep'),
  ],
)
def test_a_bad_sweep_is_refused_before_anything_trains(flags, named, text, tmp_path):
  refused = run(tmp_path / 'sweep', text, *flags)
  assert refused.returncode == 2
  assert named in refused.stderr and refused.stderr.count('\n') == 1
  assert not (tmp_path / 'sweep').exists()


def test_seeds_of_another_length_are_not_mixed_in(finished, text):
  before = losses(finished)
  refused = run(finished, text, '--sweep=latent_dim=4', '--sweep=seed=7', num_steps=14)
  assert refused.returncode == 2 and 'with num_steps=12' in refused.stderr
  assert losses(finished) == before


def test_a_foreign_folder_or_another_config_is_refused(finished, text, tmp_path):
  (tmp_path / 'thesis.tex').write_text('ten years of work')
  refused = run(tmp_path, text, *AXES)
  assert refused.returncode == 2 and 'holds no sweep' in refused.stderr
  assert os.listdir(tmp_path) == ['thesis.tex']
  before = losses(finished)
  refused = run(finished, text, *AXES, weight_decay=0.5)
  assert refused.returncode == 2 and 'weight_decay' in refused.stderr
  assert losses(finished) == before


def test_a_folder_that_cannot_be_made_is_refused(text, tmp_path):
  refused = run(text / 'sweep', text, *AXES)
  assert refused.returncode == 2
  assert f'--workdir={text}/sweep' in refused.stderr and refused.stderr.count('\n') == 1


def test_without_a_result_there_is_no_report(text, tmp_path):
  done = run(tmp_path / 'sweep', text, '--sweep=learning_rate=1e30')
  assert done.returncode == 1
  assert 'FAILED' in done.stdout and 'no report: every trial failed' in done.stdout
  assert not done.stderr


def some_trials(**changes):
  axes = ['learning_rate=1e-3,2e-3,3e-3', 'seed=0,1,2']
  config = tiny_config('mla', **changes)
  arms = {'a': {'latent_dim': 4}, 'b': {'latent_dim': 8}}
  return trials.expand(config, arms, [trials.parse_axis(axis) for axis in axes])


def test_tuning_takes_the_best_rate_to_the_other_seeds(tmp_path):
  ran = []

  def engine(todo, folder, done):
    for trial in todo:
      ran.append(trial.name)
      done(trial, fake_line(trial, {'a': 2e-3, 'b': 3e-3}))

  said = []
  sweep.run_sweep(some_trials(), tmp_path, engine, tune_on_first_seed=True, say=said.append)
  assert len(ran) == 2 * 3 + 2 * 2
  assert ran[-4:] == [
    f'{arm},learning_rate={rate},seed={seed}'
    for arm, rate in (('a', 0.002), ('b', 0.003))
    for seed in (1, 2)
  ]
  assert said[-1].startswith('[10/10]')
  summary = frontier.summarise(tmp_path)
  assert [arm['learning_rate'] for arm in summary['arms']] == [2e-3, 3e-3]
  assert [arm['learning_rate_at_edge'] for arm in summary['arms']] == [False, True]
  assert [arm['seeds'] for arm in summary['arms']] == [2, 2]  # the one that tuned does not judge
  assert any('b: its best learning rate, 0.003, is an edge' in w for w in report.warnings(summary))
  assert not any(w.startswith('a:') for w in report.warnings(summary))


def test_a_rate_that_diverged_was_tried(tmp_path):
  def engine(todo, folder, done):
    for trial in todo:
      diverges = trial.learning_rate == 3e-3
      line = (
        sweep.failed_line(trial, 'nan') if diverges else fake_line(trial, {'a': 2e-3, 'b': 2e-3})
      )
      done(trial, line)

  sweep.run_sweep(some_trials(), tmp_path, engine, say=lambda line: None)
  assert not any('edge' in warning for warning in report.warnings(frontier.summarise(tmp_path)))


@pytest.mark.parametrize('best', [1e-3, 2e-3, 3e-3])
def test_an_edge_is_told_only_where_the_loss_still_falls_towards_it(best):
  """All rates of a task that every arm solves end at no loss at all."""
  for gain, falls in ((1e-6, False), (0.1, True)):
    rates = {rate: {0: 1.5, 1: 1.5} for rate in (1e-3, 2e-3, 3e-3)}
    rates[best][0] -= gain
    judged = tuning.judge(rates)
    assert judged.rate == best and judged.at_edge == (falls and best != 2e-3)
  assert not tuning.judge({1e-3: {0: 1.5, 1: 1.5}}).at_edge


def test_arms_of_unlike_settings_are_told(tmp_path):
  def engine(todo, folder, done):
    for trial in todo:
      done(trial, fake_line(trial, {'a': 2e-3, 'b': 2e-3}))

  alike, other = some_trials(), some_trials(num_steps=77)
  sweep.run_sweep(alike, tmp_path / 'alike', engine, say=lambda line: None)
  assert not frontier.summarise(tmp_path / 'alike')['unlike_settings']
  for trials_, arm in ((alike, 'a'), (other, 'b')):
    todo = [trial for trial in trials_ if trial.arm == arm]
    sweep.run_sweep(todo, tmp_path / 'unlike', engine, say=lambda line: None)
  summary = frontier.summarise(tmp_path / 'unlike')
  warned = [w for w in report.warnings(summary) if 'no arm sets it' in w]
  assert len(warned) == 1 and warned[0].startswith('num_steps differs') and '77' in warned[0]


@pytest.mark.parametrize('number', CAUGHT, ids=CAUGHT.values())
def test_a_signal_in_a_trials_last_step_starts_no_other(tmp_path, monkeypatch, number):
  ended = []

  def run_trial(trial, folder):
    stop = StopSignal()  # the trainer's
    os.kill(os.getpid(), number)
    stop.restore()
    return fake_line(trial, {'a': 1e-3, 'b': 1e-3})

  monkeypatch.setattr(sweep, 'run_trial', run_trial)
  before = signal.getsignal(number)
  with pytest.raises(sweep.Stopped) as stopped:
    sweep.local(some_trials(), tmp_path, lambda trial, line: ended.append(trial))
  assert stopped.value.by == number
  assert len(ended) == 1
  assert signal.getsignal(number) == before


@contextlib.contextmanager
def train_elsewhere(trial, folder: Path):
  """As train.py that was started on a trial's workdir."""
  workdir = folder / 'trials' / trial.name
  workdir.mkdir(parents=True)
  with (workdir / '.lock').open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def test_a_trial_waits_for_who_trains_in_its_workdir(tmp_path, caplog):
  trial, order = some_trials()[0], []

  def train(config, workdir):
    order.append('trains')
    raise UserError('enough')

  with train_elsewhere(trial, tmp_path) as end:

    def end_soon() -> None:
      order.append('elsewhere ends')
      end()

    timer = threading.Timer(0.5, end_soon)
    timer.start()
    assert sweep.run_trial(trial, tmp_path, train)['error'] == 'enough'
    timer.join()
  assert order == ['elsewhere ends', 'trains']
  assert 'another process holds it; waiting' in caplog.text


@pytest.mark.parametrize('number', CAUGHT, ids=CAUGHT.values())
def test_a_sweep_that_waits_can_be_stopped(tmp_path, number):
  ended = []
  todo = some_trials()[:1]
  with train_elsewhere(todo[0], tmp_path):
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(sweep.Stopped) as stopped:
      sweep.local(todo, tmp_path, lambda trial, line: ended.append(trial))
  assert stopped.value.by == number and not ended


def test_two_sweeps_keep_out_of_one_folder(tmp_path):
  def engine(todo, folder, done):
    with pytest.raises(UserError, match='another sweep'):
      sweep.run_sweep(some_trials(), tmp_path, engine, say=lambda line: None)

  sweep.run_sweep(some_trials(), tmp_path, engine, say=lambda line: None)
