"""How far a sweep's running trials are, told while they run, whatever engine runs them.

A thread reads what they write to their metrics.jsonl. On a terminal that is one line that changes;
in a pipe a line now and then.
"""

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mla.sweep.trials import Trial
from mla.terminal import clock

LOOK, IN_A_PIPE = 1.0, 60.0  # seconds between two lines
TAIL = 4096  # bytes of metrics.jsonl that surely hold its last line


class Watch:
  """For the time of `with`: tells of those of `trials` that write, until ended(trial)."""

  def __init__(self, trials: Sequence[Trial], folder: Path, say: Callable[[str], None]):
    self._trials = {trial.name: trial for trial in trials}
    self._folder, self._say = folder, say
    self._terminal = sys.stderr if sys.stderr.isatty() else None  # before it is a trial's log
    self._out = sys.stdout
    self._lock, self._end = threading.Lock(), threading.Event()
    self._began = time.time()

  def __enter__(self) -> 'Watch':
    self._end.clear()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._end.set()
    self._thread.join()
    self._clear()

  def ended(self, trial: Trial) -> None:
    with self._lock:
      self._trials.pop(trial.name, None)

  def say(self, line: str) -> None:
    """A line that stays."""
    with self._lock:
      self._clear()
      self._say(line)
      self._out.flush()  # a pipe's or a file's reader sees it now

  def _run(self) -> None:
    while not self._end.wait(LOOK if self._terminal else IN_A_PIPE):
      with self._lock:
        told = self._told()
        if told and self._terminal:
          width = shutil.get_terminal_size().columns - 1
          self._terminal.write(f'\r{told[:width]}\x1b[K')
          self._terminal.flush()
        elif told:
          print(told, file=self._out, flush=True)

  def _told(self) -> str:
    """Each trial that has written since the watch began."""
    return '; '.join(filter(None, map(self._one, self._trials.values())))

  def _one(self, trial: Trial) -> str:
    line = _last_line(self._folder / 'trials' / trial.name / 'metrics.jsonl', self._began)
    if line is None:
      return ''
    steps = trial.config.num_steps
    if line['step'] >= steps:
      return f'{trial.name}: is read through its cache'
    speed = line.get('tokens_per_second')
    left = ''
    if isinstance(speed, int | float) and speed > 0:
      tokens = (steps - line['step']) * trial.config.batch_size * trial.config.seq_len
      left = f', {clock(tokens / speed)} left'
    return f'{trial.name}: step {line["step"]}/{steps}{left}'

  def _clear(self) -> None:
    if self._terminal:
      self._terminal.write('\r\x1b[K')
      self._terminal.flush()


def _last_line(path: Path, since: float) -> dict[str, Any] | None:
  """The newest whole line of a metrics.jsonl that was written to after `since`."""
  with contextlib.suppress(OSError, ValueError):
    if path.stat().st_mtime < since:
      return None
    with path.open('rb') as file:
      file.seek(max(0, path.stat().st_size - TAIL))
      lines = file.read().decode(errors='replace').splitlines()
    line = json.loads(lines[-1]) if lines else None  # a file is there before its first line
    if isinstance(line, dict) and isinstance(line.get('step'), int):
      return line
  return None
