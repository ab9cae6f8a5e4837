"""What a command says at work: a bar on a terminal, plain lines in a pipe, words kept whole."""

import collections
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

BAR = '{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}'
SAMPLE = 76  # columns of a sample, in a pipe as well: it is read by people
EVERY = 10.0  # seconds between two lines of Progress in a pipe
LOOK = 0.05  # seconds between two looks at what has ended


def bar(total: int, start: int = 0, what: str = '', *, stays: bool = True) -> tqdm | None:
  """A bar as wide as the terminal that stderr is, drawn at once; None if it is none."""
  if not sys.stderr.isatty():
    return None
  return tqdm(
    total=total,
    initial=start,
    desc=f'{what} ' if what else '',
    bar_format=BAR,
    dynamic_ncols=True,
    miniters=1,
    leave=stays,
  )


def width() -> int | None:
  """Columns of the terminal that stdout is; None if it is none: lines may be long."""
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


class Following:
  """Moves a bar as each step that was handed to the devices ends there, while the host goes ahead
  of them or waits."""

  def __init__(self, on: tqdm):
    self._bar = on
    self._waiting: collections.deque[Callable[[], bool]] = collections.deque()
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def add(self, ended: Callable[[], bool]) -> None:
    self._waiting.append(ended)

  def close(self) -> None:
    self._end.set()
    self._thread.join()

  def _run(self) -> None:
    going = True
    while going:
      going = not self._end.wait(LOOK)
      ended = 0
      while self._waiting and self._waiting[0]():
        self._waiting.popleft()
        ended += 1
      if ended:
        self._bar.update(ended)


class Progress:
  """How far some work of `total` parts is, of which it is told each."""

  def __init__(self, total: int, what: str):
    self._total, self._what, self._done = total, what, 0
    self._bar = bar(total, what=what, stays=False)
    self._began = self._told = time.monotonic()

  def move(self, parts: int = 1) -> None:
    self._done += parts
    if self._bar is not None:
      self._bar.update(parts)
      return
    now = time.monotonic()
    if now - self._told >= EVERY and 0 < self._done < self._total:
      self._told = now
      left = clock((now - self._began) / self._done * (self._total - self._done))
      print(f'{self._what}: {self._done}/{self._total}  {left} left', flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def clock(seconds: float) -> str:
  """'0:05', '12:00', '1:02:03'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes}:{rest:02d}'


def fit(text: str) -> str:
  """The text's lines, broken between words where stdout is a terminal that they do not fit."""
  columns = width()
  if columns is None:
    return text
  return '\n'.join(
    '\n'.join(textwrap.wrap(line, columns, break_long_words=False, subsequent_indent='  ')) or line
    for line in text.split('\n')
  )


def quoted(text: str) -> str:
  """A sample of text as it would be read: its line ends, wrapped, and a mark before each line."""
  lines: list[str] = []
  for line in text.split('\n'):
    line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)
    lines += textwrap.wrap(line, SAMPLE - 2) or ['']
  return '\n'.join(f'| {line}'.rstrip() for line in lines)
