"""metrics.jsonl: whatever happened to it, the whole lines of it are kept."""

import errno
import json
import os
import random
import struct
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import plain_user
from tensorboardX.proto.event_pb2 import Event

from mla import files, metrics
from mla.errors import MachineError, UserError
from mla.metrics import Metrics

LINES = [{'step': step, 'loss': 1 / step} for step in range(1, 9)]
RAW = [json.dumps(line).encode() for line in LINES]


def joined(raw: list[bytes]) -> bytes:
  return b''.join(line + b'\n' for line in raw)


def go_on(workdir: Path, start: int) -> None:
  """As a run that resumes and takes a step."""
  with Metrics(workdir, start=start, total=20) as run:
    run.write(start + 1, {'loss': 0.5})


BROKEN = {
  'cut in the middle': RAW[3][:9],
  'binary': bytes(range(10)) + b'\xff\xfe\x80',
  'no object': b'[1, 2]',
  'no step': b'{"loss": 1.0}',
  'a step that is none': b'{"step": "4"}',
  'a step that is true': b'{"step": true}',
  'nested without end': b'[' * 100_000,
  'a number without end': b'{"step": ' + b'9' * 5000 + b'}',
  'two lines in one': RAW[3] + RAW[4],
}


class Project:
  """Stands in for the wandb package: what was told to each run, by its id."""

  def __init__(self, broken_after: int = 10**9):
    self.runs: dict[str, list] = {}
    self.asked: list[dict] = []
    self.broken_after = broken_after

  def init(self, **asked):
    self.asked.append(asked)
    self.told = self.runs.setdefault(asked['id'], [])
    return self

  def log(self, values, *, step):
    if len(self.told) >= self.broken_after:
      raise OSError('no route to host')
    self.told.append((step, values))

  def finish(self):
    self.told.append('finished')


def test_weights_and_biases_repeat_the_metrics_and_a_run_goes_on_there(tmp_path, monkeypatch):
  project = Project()
  monkeypatch.setitem(sys.modules, 'wandb', project)
  for start in (0, 2):
    board = metrics.Wandb('caches', tmp_path, {'seed': 3})
    with metrics.Metrics(tmp_path, start=start, total=4, wandb=board) as writer:
      for step in (start + 1, start + 2):
        writer.write(step, {'loss': 1.0 / step})
  (told,) = project.runs.values()
  steps = [(line.pop('step'), line) for line in metrics.read(tmp_path / 'metrics.jsonl')]
  assert told == [*steps[:2], 'finished', *steps[2:], 'finished'] and len(steps) == 4
  asked = project.asked[0]
  assert asked['project'] == 'caches' and asked['config'] == {'seed': 3}
  assert asked['name'] == tmp_path.name and asked['dir'] == str(tmp_path)


def test_weights_and_biases_that_fail_later_stop_nothing(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, 'wandb', Project(broken_after=1))
  board = metrics.Wandb('caches', tmp_path, {})
  with metrics.Metrics(tmp_path, start=0, total=4, wandb=board) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 1.0})
  assert [line['step'] for line in metrics.read(tmp_path / 'metrics.jsonl')] == [1, 2, 3]
  assert [record.message.count('no route to host') for record in caplog.records] == [1]


def test_weights_and_biases_that_cannot_begin_are_a_line(tmp_path, monkeypatch):
  class Refusing(Project):
    def init(self, **asked):
      raise ValueError('no api key configured')

  monkeypatch.setitem(sys.modules, 'wandb', Refusing())
  with pytest.raises(UserError, match='--wandb=caches: .*no api key.*WANDB_MODE=offline'):
    metrics.Wandb('caches', tmp_path, {})
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r'--wandb=caches: .*pip install'):
    metrics.Wandb('caches', tmp_path, {})


@pytest.mark.parametrize('broken', BROKEN.values(), ids=BROKEN)
def test_a_broken_line_costs_no_other(tmp_path, broken, caplog):
  path = tmp_path / 'metrics.jsonl'
  before = joined([*RAW[:3], broken, *RAW[4:]])
  path.write_bytes(before)
  assert metrics.read(path) == LINES[:3] + LINES[4:]
  go_on(tmp_path, start=8)
  assert metrics.read(path) == LINES[:3] + LINES[4:] + [{'step': 9, 'loss': 0.5}]
  assert 'line 4 is broken' in caplog.text
  assert (tmp_path / 'metrics-damaged.jsonl').read_bytes() == before  # for somebody to look at
  go_on(tmp_path, start=9)  # and once only
  assert not (tmp_path / 'metrics-damaged-2.jsonl').exists()


def test_a_binary_file_is_kept_beside(tmp_path):
  rng = random.Random(10)
  for copy in ('metrics-damaged.jsonl', 'metrics-damaged.jsonl-2'):
    noise = rng.randbytes(3000)
    (tmp_path / 'metrics.jsonl').write_bytes(noise)
    go_on(tmp_path, start=8)
    assert metrics.read(tmp_path / 'metrics.jsonl') == [{'step': 9, 'loss': 0.5}]
    assert (tmp_path / copy).read_bytes() == noise


@pytest.mark.parametrize('cut', range(1, len(RAW[-1]), 7))
def test_a_line_cut_short_by_a_kill_is_no_damage(tmp_path, cut, caplog):
  (tmp_path / 'metrics.jsonl').write_bytes(joined(RAW[:-1]) + RAW[-1][:cut])
  go_on(tmp_path, start=7)
  assert metrics.read(tmp_path / 'metrics.jsonl') == [*LINES[:-1], {'step': 8, 'loss': 0.5}]
  assert not caplog.text and not (tmp_path / 'metrics-damaged.jsonl').exists()


def test_later_steps_are_forgotten_and_earlier_ones_kept(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(joined(RAW))
  go_on(tmp_path, start=5)
  assert metrics.read(tmp_path / 'metrics.jsonl') == [*LINES[:5], {'step': 6, 'loss': 0.5}]


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'dangling link'])
def test_what_is_no_file_is_refused_and_left(tmp_path, kind):
  path = tmp_path / 'metrics.jsonl'
  match kind:
    case 'folder':
      path.mkdir()
    case 'pipe':
      os.mkfifo(path)
    case 'dangling link':
      path.symlink_to(tmp_path / 'nothing')
  before = path.lstat()
  with pytest.raises(UserError, match='metrics.jsonl: .*; move it away'):
    go_on(tmp_path, start=8)
  after = path.lstat()
  assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_link_is_not_written_through(tmp_path):
  thesis = tmp_path / 'thesis.tex'
  thesis.write_text('ten years of work')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics.jsonl').symlink_to(thesis)
  go_on(tmp_path / 'run', start=0)
  assert thesis.read_text() == 'ten years of work'
  assert metrics.read(tmp_path / 'run' / 'metrics.jsonl') == [{'step': 1, 'loss': 0.5}]


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root, to become somebody else')
def test_a_denied_file_is_refused_and_left():
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)
    path = Path(folder) / 'metrics.jsonl'
    path.write_bytes(joined(RAW))
    path.chmod(0)
    with plain_user(), pytest.raises(UserError, match='metrics.jsonl: cannot be read .*denied'):
      go_on(Path(folder), start=0)
    assert path.read_bytes() == joined(RAW)


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_bytes(joined(RAW))

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(MachineError, match='metrics.jsonl: .*no space is left'):
      go_on(tmp_path, start=8)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == joined(RAW)


# TensorBoard's files only repeat it: what is wrong with them is a warning.


def events(folder: Path) -> list[Event]:
  """Read by the format's description: length, its checksum, the event, its checksum."""
  found = []
  for path in sorted(folder.iterdir()):
    raw = path.read_bytes()
    while raw:
      (length,) = struct.unpack('<Q', raw[:8])
      found.append(Event.FromString(raw[12 : 12 + length]))
      raw = raw[16 + length :]
  return found


def test_events_repeat_the_lines(tmp_path):
  with Metrics(tmp_path, start=0, total=20) as run:
    for line in LINES:
      run.write(line['step'], {'loss': line['loss'], 'eval_loss': 2.0})
    run.write_text(8, 'sample', 'Was it a car?')
  read = events(tmp_path / 'tensorboard')
  losses = {
    (event.step, value.tag): value.simple_value
    for event in read
    for value in event.summary.value
    if value.tag == 'train/loss'
  }
  assert losses == {(line['step'], 'train/loss'): pytest.approx(line['loss']) for line in LINES}
  tags = {value.tag for event in read for value in event.summary.value}
  assert all(tag.startswith(('train/', 'eval/')) for tag in tags) and 'eval/loss' in tags
  assert b'Was it a car?' in read[-1].SerializeToString()


def test_a_resumed_run_voids_the_events_after_its_start(tmp_path):
  for start in (0, 3):
    go_on(tmp_path, start)
  starts = [e.step for e in events(tmp_path / 'tensorboard') if e.HasField('session_log')]
  assert starts == [1, 4]


@pytest.mark.parametrize('kind', ['a file in its place', 'a full disk', 'a full disk later'])
def test_without_tensorboard_a_run_goes_on(tmp_path, monkeypatch, caplog, kind):
  if kind == 'a file in its place':
    (tmp_path / 'tensorboard').write_text('')
  writes = 0
  whole = files.write_all

  def full(descriptor, content):
    nonlocal writes
    if content.startswith(b'{'):
      return whole(descriptor, content)
    writes += 1
    if writes > (4 if kind == 'a full disk later' else 0):
      raise OSError(errno.ENOSPC, 'No space left on device')
    whole(descriptor, content)

  if kind != 'a file in its place':
    monkeypatch.setattr(files, 'write_all', full)
  with Metrics(tmp_path, start=0, total=20) as run:
    for line in LINES:
      run.write(line['step'], {'loss': line['loss']})
  assert metrics.read(tmp_path / 'metrics.jsonl') == LINES
  assert caplog.text.count('tensorboard: no more events go there') == 1
