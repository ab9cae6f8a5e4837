"""What a run reports: metrics.jsonl (the truth), TensorBoard, and the terminal."""

import json
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from mla import files


class Metrics:
  """Writes a run's numbers as they come; a run that resumes at `start` first forgets later ones."""

  def __init__(self, workdir: Path, *, start: int, total: int):
    self.path = workdir / 'metrics.jsonl'
    self.total = total
    _drop_after(self.path, start)
    self._file = self.path.open('a')
    self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1)
    self._bar = (
      tqdm(total=total, initial=start, unit='step', dynamic_ncols=True)
      if sys.stderr.isatty()
      else None
    )
    self._first: tuple[float, int] | None = None  # when and where the steady state began

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds one line of finite numbers."""
    self._file.write(json.dumps({'step': step, **values}, allow_nan=False) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def write_text(self, step: int, name: str, text: str) -> None:
    self._board.add_text(name, text, step)

  def progress(self, step: int, values: dict[str, float]) -> None:
    """Moves the bar on a terminal; prints a plain line in a pipe."""
    loss, speed = values['loss'], values['tokens_per_second']
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s', refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    began, start = self._first = self._first or (now, step)
    left = ''
    if step > start:
      minutes, seconds = divmod(round((now - began) / (step - start) * (self.total - step)), 60)
      left = f'  {minutes}:{seconds:02d} left'
    number = f'{step:>{len(str(self.total))}}/{self.total}'
    print(f'step {number}  loss {loss:.4f}  {speed:>7,.0f} tokens/s{left}', flush=True)

  def say(self, line: str) -> None:
    """A line of its own, above the bar where there is one."""
    if self._bar is None:
      print(line, flush=True)
    else:
      self._bar.write(line)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    self._board.close()
    self._file.close()


class NoMetrics:
  """For the processes of a run that write nothing."""

  def write(self, step: int, values: dict[str, float]) -> None:
    pass

  def write_text(self, step: int, name: str, text: str) -> None:
    pass

  def progress(self, step: int, values: dict[str, float]) -> None:
    pass

  def say(self, line: str) -> None:
    pass

  def close(self) -> None:
    pass


def read(path: Path) -> list[dict]:
  """The whole lines of a metrics.jsonl; a last line cut short by a kill is left out."""
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


def _drop_after(path: Path, step: int) -> None:
  if not path.exists():
    return
  kept = [line for line in read(path) if line['step'] <= step]
  files.write_whole(path, ''.join(json.dumps(line) + '\n' for line in kept))
