"""What a person sees while something works: in 80 columns, each step, no word broken."""

import contextlib
import fcntl
import json
import os
import struct
import termios
import time
from collections.abc import Iterator

import pytest
from conftest import tiny_config

from mla import tables, terminal
from mla.metrics import Metrics
from mla.sweep import watch
from mla.sweep.trials import expand, parse_axis

LONG = 'a sentence that is quite a bit longer than any terminal of eighty columns would be, ' * 3


class Screen:
  """A terminal of 80 columns, and all that was written to it."""

  def __init__(self, master: int):
    self._master = master
    os.set_blocking(master, False)
    self.text = ''

  def read(self) -> str:
    with contextlib.suppress(BlockingIOError):
      while part := os.read(self._master, 65536):
        self.text += part.decode()
    return self.text


@contextlib.contextmanager
def a_screen() -> Iterator[Screen]:
  """Takes the place of stdout and stderr; no fixture, whose streams pytest would take back."""
  master, slave = os.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
  with (
    os.fdopen(slave, 'w') as stream,
    contextlib.redirect_stdout(stream),
    contextlib.redirect_stderr(stream),
  ):
    yield Screen(master)
  os.close(master)


def until(holds) -> None:
  deadline = time.monotonic() + 20
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_the_bar_moves_when_a_step_ends_not_when_it_is_queued(tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  ended = 0
  with a_screen() as screen, Metrics(tmp_path, start=0, total=5) as metrics:
    until(lambda: '0/5' in screen.read())  # before anything is done
    metrics.doing('compiling the training step')
    until(lambda: 'compiling' in screen.read())
    for step in range(1, 6):
      metrics.step(lambda step=step: ended >= step)
    for step in range(1, 6):
      assert f'{step}/5' not in screen.read()
      time.sleep(0.11)  # tqdm draws no more often than every tenth of a second
      ended = step
      until(lambda step=step: f'{step}/5' in screen.read())
    metrics.progress(5, {'loss': 1.2345, 'tokens_per_second': 1_234_567.8})
    metrics.say(LONG)
    screen.read()
  shown = screen.text.replace('\r', '\n').split('\n')
  assert max(map(len, shown)) <= 80
  words = ' '.join(' '.join(shown).split())
  assert LONG.strip() in words  # whole words, in their order


def test_in_a_pipe_nothing_moves(tmp_path, capsys):
  with Metrics(tmp_path, start=0, total=5) as metrics:
    metrics.doing('compiling')
    metrics.step(lambda: True)
    metrics.progress(1, {'loss': 1.0, 'tokens_per_second': 10.0})
    metrics.say(LONG)
  out, err = capsys.readouterr()
  assert out.splitlines() == ['compiling', 'step 1/5  loss 1.0000       10 tokens/s', LONG]
  assert err == ''


def test_a_sample_is_read_as_text():
  shown = terminal.quoted(f'Dear all,\n\n{LONG}\x1b[31m bell\x07').splitlines()
  assert shown[:2] == ['| Dear all,', '|']
  assert all(line.startswith('|') and len(line) <= terminal.SAMPLE for line in shown)
  assert '\\x1b[31m' in shown[-1] and '\\x07' in shown[-1]


@pytest.mark.parametrize(('seconds', 'told'), [(4.6, '0:05'), (9e2, '15:00'), (3723.0, '1:02:03')])
def test_times(seconds, told):
  assert terminal.clock(seconds) == told


def test_progress_in_a_pipe_tells_how_long_it_will_take(capsys, monkeypatch):
  monkeypatch.setattr(terminal, 'EVERY', 0.0)
  progress = terminal.Progress(3, 'int8 cache')
  for _ in range(3):
    progress.move()
  progress.close()
  assert capsys.readouterr().out.splitlines() == [
    'int8 cache: 1/3  0:00 left',
    'int8 cache: 2/3  0:00 left',
  ]


def test_a_running_trial_is_told_by_what_it_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(watch, 'LOOK', 0.02)
  config = tiny_config(num_steps=400, batch_size=8, seq_len=32)
  first, second = expand(config, {}, [parse_axis('seed=0,1')])
  line = {'step': 100, 'loss': 2.0, 'tokens_per_second': 8 * 32 * 10}
  folder = tmp_path / 'trials' / first.name
  said: list[str] = []
  with a_screen() as screen, watch.Watch([first, second], tmp_path, said.append) as watching:
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n' + json.dumps(line) + '\n')
    until(lambda: 'seed=0: step 100/400, 0:30 left' in screen.read())
    (folder / 'metrics.jsonl').write_text('{"step": 400, "eval_loss": 2.0}\n')
    until(lambda: 'seed=0: is read through its cache' in screen.read())
    watching.ended(first)
    watching.say('[1/2] seed=0')
  assert said == ['[1/2] seed=0'] and 'seed=1' not in screen.text


def test_a_table_is_folded_between_columns_to_the_terminal():
  heads = ['run', *(f'column {number}' for number in range(9))]
  rows = [[name, *(f'{name}{number}' for number in range(9))] for name in ('a', 'b')]
  whole = tables.columns([heads, *rows], words={0})
  folded = tables.columns([heads, *rows], words={0}, width=40)
  assert max(map(len, whole.splitlines())) > 80 and max(map(len, folded.splitlines())) <= 40
  assert set(whole.replace('-', '').split()) == set(folded.replace('-', '').split())
  blocks = folded.split('\n\n')
  assert [line.split()[0] for line in blocks[-1].splitlines()[2:]] == ['a', 'b']
