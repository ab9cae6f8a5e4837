"""SIGTERM and Ctrl-C: the first is noted, so that work can be saved; a second ends at once."""

import os
import signal
import threading
from typing import Any, ClassVar

CAUGHT = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}


class Stopped(Exception):
  """Work was ended because a signal came; what it had made is kept."""


def exit_code(by: int) -> int:
  """The exit code of a command that a signal ended, as a shell says it: 143 SIGTERM, 130 Ctrl-C."""
  return 128 + by


class StopSignal:
  """Notes the first signal until restore(). One made while another is at work looks at that one.

  Only the first thread can catch signals; made in another one it never sees any.
  """

  _at_work: ClassVar['StopSignal | None'] = None

  def __init__(self):
    self._noted = 0
    self._outer = StopSignal._at_work
    self._handlers: dict[int, Any] = {}
    if self._outer is None and threading.current_thread() is threading.main_thread():
      self._catch()

  @property
  def requested(self) -> int:
    """The number of the signal that came first; 0 while there was none."""
    return self._noted if self._outer is None else self._outer.requested

  def _catch(self) -> None:
    StopSignal._at_work = self
    # A handler in Python waits for the first thread, which may be compiling for a minute. What the
    # system writes into this pipe as a signal comes, another thread sees at once.
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
    for number in CAUGHT:
      self._handlers[number] = signal.signal(number, self._note)

  def _note(self, number: int, frame: Any) -> None:
    self._noted = self._noted or number

  def _watch(self, reader: int) -> None:
    came = 0
    while number := os.read(reader, 1):
      came += number[0] in CAUGHT
      if came == 2:
        os._exit(exit_code(number[0]))
    os.close(reader)

  def restore(self) -> None:
    """Gives the signals back to whom they belonged before."""
    if StopSignal._at_work is not self:
      return
    for number, handler in self._handlers.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._wakeup)
    os.close(self._writer)
    StopSignal._at_work = None
