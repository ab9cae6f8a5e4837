"""Crashes are told from preemptions: who was told to end, or lost its machine, has not crashed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mla.sweep import restarts

NOW = {'sweep': 'this', 'step': 20, 'node': 'here', 'alive': {'here', 'there'}}


def start(path: Path, **changes) -> int:
  """What a process that starts is told; it then crashes."""
  with restarts.counting(path, **{**NOW, **changes}) as crashes:
    return crashes


def test_crashes_are_counted_until_it_gets_further(tmp_path):
  path = tmp_path / 'starts' / 'seed=0.json'
  assert [start(path) for _ in range(4)] == [0, 1, 2, 3]
  assert [start(path, step=40) for _ in range(3)] == [0, 1, 2]


def test_a_lost_machine_is_no_crash(tmp_path):
  path = tmp_path / 'seed=0.json'
  for _ in range(20):
    assert start(path, node='lost') == 0
  assert [start(path, node='there') for _ in range(3)] == [0, 1, 2]


def test_another_sweep_begins_anew(tmp_path):
  path = tmp_path / 'seed=0.json'
  for _ in range(9):
    start(path, sweep='killed')
  assert start(path) == 0


PROCESS = """
import os, signal, sys, threading
from pathlib import Path
from mla.sweep import restarts

def trial():
  with restarts.counting(Path(sys.argv[1]), sweep='this', step=20, node='here', alive={'here'}):
    os.kill(os.getpid(), int(sys.argv[2]))
    threading.Event().wait()

# As in Ray's workers: the trial is on a thread, and SIGTERM ends the first one.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
threading.Thread(target=trial, daemon=True).start()
while True:
  signal.pause()
"""


@pytest.mark.parametrize('by, crashes', [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_a_process_that_was_told_to_end_has_not_crashed(by, crashes, tmp_path):
  path = tmp_path / 'seed=0.json'
  root = Path(__file__).parent.parent.parent
  command = [sys.executable, '-c', PROCESS, str(path), str(int(by))]
  assert subprocess.run(command, cwd=root).returncode != 0
  assert start(path) == crashes


@pytest.mark.parametrize('damage', [b'', b'[]', b'\xff', {'step': '20'}, {'crashes': None}])
def test_a_damaged_count_begins_anew(damage, tmp_path):
  path = tmp_path / 'seed=0.json'
  start(path)
  start(path)
  whole = json.loads(path.read_bytes())
  path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(whole | damage).encode())
  assert [start(path) for _ in range(2)] == [0, 1]


def test_a_count_that_cannot_be_kept_ends_nothing(tmp_path):
  (tmp_path / 'starts').write_text('no folder')
  assert start(tmp_path / 'starts' / 'seed=0.json') == 0


def test_the_newest_checkpoint(tmp_path):
  assert restarts.newest_step(tmp_path) == 0
  for name in ('4', '12', '16.orbax-checkpoint-tmp'):
    (tmp_path / 'checkpoints' / name).mkdir(parents=True)
  assert restarts.newest_step(tmp_path) == 12
