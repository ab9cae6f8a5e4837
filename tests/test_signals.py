"""The first signal is noted, a second ends at once; several that listen share one."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from mla import cli
from mla.signals import CAUGHT, StopSignal, exit_code

# Works on for a minute in C code, in which no handler of Python's runs, as XLA's compiler does.
BUSY = """
import hashlib
from mla.signals import StopSignal
outer, inner = StopSignal(), StopSignal()
print('ready', flush=True)
hashlib.pbkdf2_hmac('sha256', b'word', b'salt', 10**8)
"""


@pytest.fixture(autouse=True)
def handlers():
  before = {number: signal.getsignal(number) for number in CAUGHT}
  yield
  assert {number: signal.getsignal(number) for number in CAUGHT} == before


@pytest.mark.parametrize('first', CAUGHT, ids=CAUGHT.values())
@pytest.mark.parametrize('second', CAUGHT, ids=CAUGHT.values())
def test_a_second_signal_ends_at_once_whatever_is_being_done(first, second):
  with subprocess.Popen(
    [sys.executable, '-c', BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(first)
    time.sleep(0.3)
    assert process.poll() is None  # what it does is to be saved
    process.send_signal(second)
    try:
      assert process.wait(timeout=10) == exit_code(second)
    finally:
      process.kill()
    assert process.stderr.read() == ''


@pytest.mark.parametrize('number', CAUGHT, ids=CAUGHT.values())
def test_who_listens_within_another_hears_the_same(number):
  outer = StopSignal()
  inner = StopSignal()
  assert not outer.requested and not inner.requested
  signal.raise_signal(number)
  assert outer.requested == inner.requested == number
  inner.restore()
  assert StopSignal().requested == number  # one made afterwards, too
  outer.restore()
  later = StopSignal()
  assert not later.requested
  later.restore()


def test_what_came_first_counts():
  stop = StopSignal()
  stop._note(signal.SIGINT, None)
  stop._note(signal.SIGTERM, None)
  assert stop.requested == signal.SIGINT
  stop.restore()


def test_on_another_thread_there_is_nothing_to_hear():
  found = []

  def work() -> None:
    stop = StopSignal()
    found.append(stop.requested)
    stop.restore()

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [0]


def test_ctrl_c_with_nothing_to_save_ends_quietly(capsys, monkeypatch):
  """eval.py's way, and any command's before its work begins."""
  monkeypatch.setattr(cli, 'log_plainly', lambda: None)
  monkeypatch.setattr(cli, '_keep_output_open', lambda: None)

  def main():
    signal.raise_signal(signal.SIGINT)

  # As Python begins: what ran in this process before, asyncio among it, may have set another.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(SystemExit) as ended:
      cli.run(main, ['eval.py'])
  finally:
    signal.signal(signal.SIGINT, before)
  assert ended.value.code == 130
  assert capsys.readouterr().err == ''
