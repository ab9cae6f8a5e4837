"""What a sweep keeps: found by config, never done twice, refused where it is damaged."""

import io
import json
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from sweeps import fake_line

from configs import mha_small
from configs.sweeps.frontier import get_arms
from mla import cost
from mla.errors import Diverged, MachineError, UserError
from mla.sweep import frontier, report, trials
from mla.sweep import run as sweep

PUBLISHED = Path(__file__).parent.parent.parent / 'results' / 'frontier'
AXES = ('latent_dim=4,8', 'learning_rate=1e-3,2e-3', 'seed=0,1')
COSTS = {
  'flops_per_token': 2e6,
  'training_memory': {
    remat: {'peak_bytes': 4, 'activation_bytes': 2} for remat in ('none', 'latents')
  },
}


def expand(*axes: str, arms=None, **changes) -> list[trials.Trial]:
  return trials.expand(
    tiny_config('mla', **changes), arms or {}, [trials.parse_axis(axis) for axis in axes]
  )


def without_costs(trial: trials.Trial) -> dict:
  line = fake_line(trial, {trial.arm: 1e-3})
  return {name: value for name, value in line.items() if name not in COSTS}


def run(todo: list[trials.Trial], folder: Path, line_of=without_costs) -> tuple[list, list[str]]:
  """A sweep whose trials end at once; the trials that it ran, and what it said."""
  ran: list[trials.Trial] = []
  said: list[str] = []

  def engine(left, folder, done):
    for trial in left:
      ran.append(trial)
      done(trial, line_of(trial))

  sweep.run_sweep(todo, folder, engine, say=said.append)
  return ran, said


# A trial is its config.


@pytest.mark.parametrize(
  'again',
  [
    ('seed=0,1', 'learning_rate=1e-3,2e-3', 'latent_dim=4,8'),
    ('learning_rate=0.002,0.0010', 'seed=1,0', 'latent_dim=8,4'),
    ('seed,latent_dim=0:4,1:4,0:8,1:8', 'learning_rate=1e-3,2e-3'),
    ('remat=latents', *AXES),  # which changes nothing that is learned
    ('mesh.fsdp=1', *AXES),
  ],
)
def test_the_same_trials_in_other_words_are_done(again, tmp_path):
  assert len(run(expand(*AXES), tmp_path)[0]) == 8
  ran, said = run(expand(*again), tmp_path)
  assert not ran
  assert said == ['all 8 trials were done already; nothing to train']
  # The arms have this command's names, for --reference to find them by.
  arms = {trial.arm for trial in expand(*again)}
  assert {arm['arm'] for arm in frontier.summarise(tmp_path)['arms']} == arms


def in_the_order_of_the_flags(folder: Path) -> None:
  """Names as older versions gave them."""
  path = folder / 'results.jsonl'
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  for line in lines:
    line.pop('checksum', None)
    line['trial'] = ','.join(reversed(line['trial'].split(',')))
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def make_folder(path: Path) -> Path:
  (path / 'trials').mkdir(parents=True)
  return path


def test_results_under_older_names_are_found(tmp_path):
  todo = expand('remat=none', *AXES)  # two fields in an arm's name
  run(todo[:6], tmp_path)
  in_the_order_of_the_flags(tmp_path)
  ran, said = run(todo, tmp_path)
  assert [trial.name for trial in ran] == [trial.name for trial in todo[6:]]
  assert said[0] == '6 of 8 trials are done already'
  assert len((tmp_path / 'results.jsonl').read_text().splitlines()) == 8


def test_a_config_that_an_older_version_did_twice_counts_once(tmp_path):
  todo = expand('latent_dim=4,8', 'seed=0,1')
  run(todo, tmp_path)
  path = tmp_path / 'results.jsonl'
  first = path.read_text()
  in_the_order_of_the_flags(tmp_path)
  path.write_text(first + path.read_text())
  assert not run(todo, tmp_path)[0]
  assert all(arm['seeds'] == 2 for arm in frontier.summarise(tmp_path)['arms'])


def test_a_half_trained_trial_goes_on_in_its_folder(tmp_path):
  (trial,) = expand('latent_dim=4', 'seed=1')
  older = tmp_path / 'trials' / 'seed=1,latent_dim=4'
  (older / 'checkpoints').mkdir(parents=True)
  (older / 'config.json').write_text(json.dumps(trial.config.to_dict()))
  ran, _ = run([trial], tmp_path)
  assert [trial.name for trial in ran] == [older.name]


def test_todays_code_knows_the_published_trials(tmp_path):
  shutil.copy(PUBLISHED / 'results.jsonl', tmp_path)
  shutil.copy(PUBLISHED / 'windows.npz', tmp_path)
  config = mha_small.get_config()
  config.update({'num_steps': 800, 'warmup_steps': 150, 'eval_every': 800})
  axes = [trials.parse_axis('seed=0,1,2,3,4,5'), trials.parse_axis('learning_rate=3e-3')]
  ran, _ = run(trials.expand(config, get_arms(), axes), tmp_path)
  # Its rate of 3e-3 was not the best of that arm.
  assert {trial.arm for trial in ran} == {'mla-c2'}


@pytest.mark.parametrize(
  'axes, named',
  [
    (['remat=none,latents'], 'remat makes no difference'),
    (['mesh.fsdp=1,2', 'seed=0,1'], 'mesh.fsdp makes no difference'),
    (['data.eval_tokens=64,128'], 'data.eval_tokens makes no difference'),
  ],
)
def test_a_sweep_is_asked_for_nothing_twice(axes, named):
  with pytest.raises(UserError, match=f'{named}.*again; give one of the two'):
    expand(*axes)


def test_fields_that_an_arm_does_not_read_make_no_other_trial(text, tmp_path):
  files = {'data__files': str(text)}
  todo = expand('attention=mha,mla', 'latent_dim=4,8', **files)
  with pytest.raises(UserError, match='attention=mha,latent_dim=8: latent_dim makes no difference'):
    trials.check(todo, tmp_path, on_these_devices=False)
  todo = expand('attention,latent_dim=mha:4,mla:4,mla:8', **files)
  trials.check(todo, tmp_path, on_these_devices=False)


# Costs are the report's.


def count_compilations(monkeypatch, found) -> list:
  """Has costs found at once; returns the list that grows with each time that they are asked for."""
  asked = []

  def training_costs(config, vocab):
    asked.append(config.latent_dim)
    if isinstance(found, Exception):
      raise found
    return found

  monkeypatch.setattr(cost, 'training_costs', training_costs)
  return asked


def with_costs(todo: list[trials.Trial], folder: Path) -> dict:
  """The summary after a sweep."""
  lines = sweep.run_sweep(todo, folder, sweep.local, say=lambda line: None)
  sweep.add_costs(todo, lines, folder, say=lambda line: None)
  return frontier.summarise(folder)


@pytest.fixture
def todo(text) -> list[trials.Trial]:
  return expand('latent_dim=4,8', 'seed=0,1', data__files=str(text))


@pytest.mark.parametrize(
  'found, told',
  [
    (MemoryError('8 GB of scores'), 'MemoryError: 8 GB of scores'),
    ({**COSTS, 'flops_per_token': float('nan')}, 'the compiler counts none'),
    ({**COSTS, 'flops_per_token': -1.0}, 'the compiler counts none'),
  ],
)
def test_costs_that_cannot_be_had_are_a_warning(found, told, todo, tmp_path, monkeypatch):
  asked = count_compilations(monkeypatch, found)
  run(todo, tmp_path)
  summary = with_costs(todo, tmp_path)
  assert asked == [4, 8]
  assert [arm['flops_per_token'] for arm in summary['arms']] == [None, None]
  warned = [line for line in report.warnings(summary) if told in line]
  assert len(warned) == 2 and all('costs/' in line and 'remove' in line for line in warned)
  assert report.written(summary).count('| - | - |') >= 2
  with_costs(todo, tmp_path)
  assert asked == [4, 8], 'they were compiled again, for the same end'
  (tmp_path / 'costs' / f'{todo[0].arm_digest}.json').unlink()
  with_costs(todo, tmp_path)
  assert asked == [4, 8, 4], 'the cure that the warning names'


def test_a_trial_is_done_whatever_its_costs(todo, tmp_path, monkeypatch):
  asked = count_compilations(monkeypatch, MemoryError())
  nll = np.array([1.5, 2.5], np.float32)
  figures = {'workdir': '', 'perplexity_ci95': None, 'tokens_evaluated': 4}
  monkeypatch.setattr(sweep, 'score_widths', lambda *_, **__: [(figures, nll)])
  line = sweep.run_trial(todo[0], tmp_path, lambda config, workdir: True)
  assert line['status'] == 'done' and line['loss'] == 1.0
  assert not asked


def test_older_lines_bring_their_costs(todo, tmp_path, monkeypatch):
  asked = count_compilations(monkeypatch, COSTS)
  run(todo, tmp_path, lambda trial: {**without_costs(trial), **COSTS})
  summary = with_costs(todo, tmp_path)
  assert not asked and not (tmp_path / 'costs').exists()
  assert [arm['flops_per_token'] for arm in summary['arms']] == [2e6, 2e6]


@pytest.mark.parametrize(
  'damage', [b'', b'\xff\x00', b'[]', b'{}', b'[' * 100_000, b'2e6', 'a digit', 'a link']
)
def test_damaged_costs_are_made_again(damage, todo, tmp_path, monkeypatch):
  asked = count_compilations(monkeypatch, COSTS)
  run(todo, tmp_path)
  healthy = with_costs(todo, tmp_path)
  path = tmp_path / 'costs' / f'{todo[0].arm_digest}.json'
  if damage == 'a digit':
    damage = path.read_bytes().replace(b'2000000', b'2000001')
  path.unlink()
  if damage == 'a link':
    path.symlink_to(tmp_path / 'nothing')
  else:
    path.write_bytes(damage)
  assert with_costs(todo, tmp_path) == healthy
  assert asked == [4, 8, 4]
  assert not path.is_symlink() and not (tmp_path / 'nothing').exists()


def test_sigterm_while_costs_are_compiled_keeps_them(todo, tmp_path, monkeypatch):
  def training_costs(config, vocab):
    os.kill(os.getpid(), signal.SIGTERM)
    return COSTS

  monkeypatch.setattr(cost, 'training_costs', training_costs)
  run(todo, tmp_path)
  with pytest.raises(sweep.Stopped):
    with_costs(todo, tmp_path)
  asked = count_compilations(monkeypatch, COSTS)
  summary = with_costs(todo, tmp_path)
  assert asked == [8] and not any('costs_unknown' in arm for arm in summary['arms'])


# What failed, and whether it is tried again.


def test_what_diverged_has_ended_and_what_failed_is_tried_again(tmp_path):
  def fate(trial: trials.Trial) -> dict:
    error = {4: Diverged('the loss is no longer finite'), 8: MachineError('no space is left')}

    def train(config, workdir):
      raise error[trial.config.latent_dim]

    return sweep.run_trial(trial, tmp_path, train)

  todo = expand('latent_dim=4,8', 'seed=0,1')
  assert len(run(todo, tmp_path, fate)[0]) == 4
  ran, said = run(todo, tmp_path)
  assert [trial.name for trial in ran] == ['latent_dim=8,seed=0', 'latent_dim=8,seed=1']
  assert said[0].startswith('2 of 4 trials are done already (2 of them diverged, as they would ag')
  assert said[0].endswith('; 2 that failed before are tried again')
  assert 'take their lines out of results.jsonl' in said[0]
  _, said = run(todo, tmp_path)
  assert len(said) == 1 and said[0].startswith('all 4 trials were done already (2 of them diverged')


@pytest.mark.parametrize('place', ['logs/seed=0.txt', 'trials/seed=0'])
def test_a_place_that_is_taken_fails_its_trial_only(place, tmp_path):
  (tmp_path / 'thesis.tex').write_text('ten years of work')
  (tmp_path / place).parent.mkdir()
  (tmp_path / place).symlink_to(tmp_path / 'thesis.tex')
  (trial,) = expand('seed=0')
  line = sweep.run_trial(trial, tmp_path, lambda config, workdir: print('trains') or False)
  assert line['status'] == 'failed' and place in line['error']
  assert (tmp_path / 'thesis.tex').read_text() == 'ten years of work'


# Damage is refused, by name and with the cure, and nothing is touched.


def changed(**fields) -> bytes:
  """A line of results.jsonl as an older version wrote it, with some fields changed."""
  (trial,) = expand('latent_dim=4', 'seed=7')
  line = {**without_costs(trial), **fields}
  line.pop('window_nll')
  return json.dumps({name: value for name, value in line.items() if value != 'gone'}).encode()


LINES = {
  'noise': b'\xff\xfe\x00\x80',
  'cut short': b'{"trial": "latent_dim=4,seed=7", "arm": "lat',
  'null': b'null',
  'nested': b'[' * 100_000,
  'of a run': b'{"step": 4, "loss": 2.5}',
  'no digest': changed(digest='gone'),
  'a loss that is text': changed(loss='1.2'),
  'a loss that is none': changed(loss=float('nan')),
  'fields that are none': changed(fields=[1]),
  'settings that are none': changed(settings='x'),
  'out of the folder': changed(trial='../../elsewhere'),
  'costs elsewhere': changed(arm_digest='../../elsewhere'),
  'another status': changed(status='stopped'),
  'a digit changed': changed(loss=1.25, checksum='0123456789abcdef'),
  'twice': changed(trial='latent_dim=4,learning_rate=0.001,seed=0'),
}


@pytest.mark.parametrize('kind', LINES)
def test_a_damaged_line_is_refused(kind, tmp_path):
  todo, path = expand(*AXES), tmp_path / 'results.jsonl'
  run(todo, tmp_path)
  lines = path.read_bytes().splitlines(keepends=True)
  damaged = b''.join([lines[0], LINES[kind] + b'\n', *lines[1:]])
  path.write_bytes(damaged)
  for doing in (lambda: run(todo, tmp_path), lambda: frontier.summarise(tmp_path)):
    with pytest.raises(
      UserError, match=r'results.jsonl: line [23] .*restore the file, or take tha'
    ):
      doing()
  assert path.read_bytes() == damaged
  path.write_bytes(b''.join(lines[1:]))  # the cure
  assert [trial.name for trial in run(todo, tmp_path)[0]] == [todo[0].name]


class Payload:
  """Calls something when it is unpickled."""

  def __init__(self, path: Path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def archive(**arrays) -> bytes:
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


def saved(array: np.ndarray) -> bytes:
  out = io.BytesIO()
  np.save(out, array)
  return out.getvalue()


def zipped(name: str, content: bytes) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as packed:
    packed.writestr(name, content)
  return out.getvalue()


WINDOWS = {
  'noise': lambda elsewhere: b'\xff' * 100,
  'empty': lambda elsewhere: b'',
  'cut short': lambda elsewhere: archive(a=np.ones(4))[:-40],
  'a lone array': lambda elsewhere: saved(np.ones(4)),
  'a pickle': lambda elsewhere: pickle.dumps(Payload(elsewhere)),
  'pickled inside': lambda elsewhere: archive(a=np.array([Payload(elsewhere)], object)),
  'no array inside': lambda elsewhere: zipped('a.npy', b'some text'),
  'another file inside': lambda elsewhere: zipped('thesis.tex', b'some text'),
  'a matrix': lambda elsewhere: archive(a=np.ones((2, 2))),
  'integers': lambda elsewhere: archive(a=np.ones(2, int)),
  'not finite': lambda elsewhere: archive(a=np.array([np.nan])),
  'without a window': lambda elsewhere: archive(a=np.ones(0)),
}


@pytest.mark.parametrize('kind', WINDOWS)
def test_damaged_windows_are_refused(kind, tmp_path):
  todo = expand('latent_dim=4,8', 'seed=0,1')
  path, elsewhere = tmp_path / 'windows.npz', tmp_path / 'unpickled'
  run(todo[:-1], tmp_path)
  damaged = WINDOWS[kind](elsewhere)
  path.write_bytes(damaged)
  for doing in (lambda: run(todo, tmp_path), lambda: frontier.summarise(tmp_path)):
    with pytest.raises(UserError, match='windows.npz: .*restore the file, or remove it'):
      doing()
  assert path.read_bytes() == damaged and not elsewhere.exists()
  path.unlink()  # the cure
  run(todo, tmp_path)
  assert frontier.summarise(tmp_path)['arms'][0]['seeds'] == 2


@pytest.mark.parametrize('name', ['results.jsonl', 'windows.npz'])
@pytest.mark.parametrize('kind', ['a folder', 'a link to nothing', 'a pipe'])
def test_what_is_no_file_is_refused(name, kind, tmp_path):
  path = tmp_path / name
  make = {
    'a folder': path.mkdir,
    'a link to nothing': lambda: path.symlink_to(tmp_path / 'nothing'),
    'a pipe': lambda: os.mkfifo(path),
  }
  make[kind]()
  with pytest.raises(UserError, match=f'{name}: .*restore'):
    run(expand(*AXES), tmp_path)
  assert not (tmp_path / 'nothing').exists() and os.path.lexists(path)


def test_any_name_of_an_arm_keeps_its_windows(tmp_path):
  arms = {'file': {'latent_dim': 4}, 'self': {'latent_dim': 6}, 'größe': {'latent_dim': 8}}
  todo = expand('rope_dim=4', arms=arms)
  for trial in todo:  # names that numpy and zipfile have uses of their own for
    run([trial], tmp_path)
  with np.load(tmp_path / 'windows.npz', allow_pickle=False) as stored:
    assert sorted(stored.files) == sorted(trial.name for trial in todo)
