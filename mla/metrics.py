"""What a run reports: metrics.jsonl (the truth), TensorBoard, and the terminal."""

import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from mla import files, terminal
from mla.errors import UserError, first_line

CURE = 'move it away'


class Metrics:
  """Writes a run's numbers as they come; a run that resumes at `start` first forgets later ones.

  Raises MachineError or UserError where metrics.jsonl cannot be written. TensorBoard's files only
  repeat it, so what is wrong with them is a warning.
  """

  def __init__(self, workdir: Path, *, start: int, total: int, wandb: 'Wandb | None' = None):
    self.path = workdir / 'metrics.jsonl'
    self.total = total
    _drop_after(self.path, start)
    try:
      self._file = files.open_to_append(self.path)
    except OSError as error:
      raise files.cannot(f'{self.path}: cannot be written', error, CURE) from error
    self._board = Board(workdir / 'tensorboard', start)
    self._wandb = wandb
    self._bar = terminal.bar(total, start)
    self._following = None if self._bar is None else terminal.Following(self._bar)
    self._first: tuple[float, int] | None = None  # when and where the steady state began

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds one line of finite numbers."""
    line = json.dumps({'step': step, **values}, allow_nan=False) + '\n'
    try:
      files.write_all(self._file, line.encode())
    except OSError as error:
      raise files.cannot(f'{self.path}: cannot be written', error, CURE) from error
    for name, value in values.items():
      self._board.add(step, summary=summary.scalar(tag(name), value))
    if self._wandb is not None:
      self._wandb.log(step, values)

  def write_text(self, step: int, name: str, text: str) -> None:
    self._board.add(step, summary=summary.text(f'eval/{name}', text))

  def step(self, ended: Callable[[], bool]) -> None:
    """One more is under way; ended() says whether the devices are through with it."""
    if self._following is not None:
      self._following.add(ended)

  def doing(self, what: str) -> None:
    """What takes time before the next step: beside the bar, or a line."""
    if self._bar is None:
      print(what, flush=True)
    else:
      self._bar.set_postfix_str(what)

  def progress(self, step: int, values: dict[str, float]) -> None:
    """Beside the bar on a terminal; a plain line in a pipe."""
    loss, speed = values['loss'], values['tokens_per_second']
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s')
      return
    now = time.monotonic()
    began, start = self._first = self._first or (now, step)
    left = ''
    if step > start:
      left = f'  {terminal.clock((now - began) / (step - start) * (self.total - step))} left'
    if 'mfu' in values:
      left = f'  {values["mfu"]:.0%} MFU{left}'
    number = f'{step:>{len(str(self.total))}}/{self.total}'
    print(f'step {number}  loss {loss:.4f}  {speed:>7,.0f} tokens/s{left}', flush=True)

  def say(self, line: str) -> None:
    """A line of its own, above the bar where there is one."""
    if self._bar is None:
      print(terminal.fit(line), flush=True)
    else:
      self._bar.write(terminal.fit(line))

  def close(self) -> None:
    if self._bar is not None and self._following is not None:
      self._following.close()
      self._bar.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.close()
    os.close(self._file)

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def tag(name: str) -> str:
  """A number's name in TensorBoard: train/loss, eval/bits_per_byte."""
  return f'eval/{name.removeprefix("eval_")}' if name.startswith('eval_') else f'train/{name}'


class Board:
  """TensorBoard's event file, written at once and in the caller's thread.

  tensorboardX has a thread for it: one that meets a full disk dies there, and the run then waits
  for ever to hand it the next event. Here the first error ends the file, with a warning.
  """

  def __init__(self, folder: Path, start: int):
    self._folder = folder
    self._file: int | None = None
    name = f'events.out.tfevents.{int(time.time())}.{os.uname().nodename}.{os.getpid()}'
    try:
      folder.mkdir(exist_ok=True)
      path = files.unused(folder / name)
      self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
      self._give_up(error)
    self.add(0, file_version='brain.Event:2')
    # Whatever an earlier file holds from the next step on is void.
    self.add(start + 1, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, **what: Any) -> None:
    """Adds an event: a summary=, or what else an Event has."""
    if self._file is None:
      return
    event = Event(step=step, wall_time=time.time(), **what).SerializeToString()
    length = struct.pack('<Q', len(event))
    sums = (struct.pack('<I', masked_crc32c(part)) for part in (length, event))
    try:
      files.write_all(self._file, length + next(sums) + event + next(sums))
    except OSError as error:
      self._give_up(error)

  def _give_up(self, error: OSError) -> None:
    self.close()
    logging.warning('%s: no more events go there (%s)', self._folder, error.strerror)

  def close(self) -> None:
    if self._file is not None:
      os.close(self._file)
      self._file = None


class Wandb:
  """A run in a project of Weights & Biases, if that is installed; what is wrong later is a warning.

  A workdir keeps its run's name there in .wandb_run, so that going on goes on there too. UserError
  where none can be begun.
  """

  def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        f"--wandb={project}: Weights & Biases is not installed; pip install -e '.[wandb]'"
      ) from error
    path = workdir / '.wandb_run'
    if not os.path.lexists(path):
      files.write_whole(path, secrets.token_hex(4))
    name = files.read_bytes(path, CURE).decode()
    try:
      self._run = wandb.init(
        project=project,
        id=name,
        name=workdir.name,
        dir=str(workdir),
        config=config,
        resume='allow',
      )
    except Exception as error:  # whatever it raises without a login or a network
      raise UserError(
        f'--wandb={project}: no run can be begun ({first_line(error)}); call `wandb login`, or set '
        'WANDB_MODE=offline'
      ) from error

  def log(self, step: int, values: dict[str, float]) -> None:
    self._tell(lambda run: run.log(values, step=step))

  def close(self) -> None:
    self._tell(lambda run: run.finish())

  def _tell(self, what: Callable[[Any], None]) -> None:
    try:
      if self._run is not None:
        what(self._run)
    except Exception as error:
      self._run = None
      logging.warning('Weights & Biases: no more metrics go there (%s)', first_line(error))


class NoMetrics:
  """For the processes of a run that write nothing."""

  def write(self, step: int, values: dict[str, float]) -> None:
    pass

  def write_text(self, step: int, name: str, text: str) -> None:
    pass

  def progress(self, step: int, values: dict[str, float]) -> None:
    pass

  def step(self, ended: Callable[[], bool]) -> None:
    pass

  def doing(self, what: str) -> None:
    pass

  def say(self, line: str) -> None:
    pass

  def close(self) -> None:
    pass


def read(path: Path) -> list[dict]:
  """The whole lines of a metrics.jsonl.

  A last line cut short by a kill is left out; so is, with a warning, one that is broken. UserError
  if the file can't be read.
  """
  lines, broken = _read(path)
  if broken:
    logging.warning('%s: %d broken lines are left out, line %d first', path, len(broken), broken[0])
  return lines


def _read(path: Path) -> tuple[list[dict], list[int]]:
  """The whole lines, and the numbers of those that are broken."""
  lines, broken = [], []
  raw = files.read_bytes(path, CURE).split(b'\n')
  for number, part in enumerate(raw, 1):
    try:
      line = json.loads(part.decode())
    except (ValueError, RecursionError):
      line = None
    if isinstance(line, dict) and type(line.get('step')) is int:
      lines.append(line)
    elif part and number < len(raw):  # what follows the last line's end may be cut short
      broken.append(number)
  return lines, broken


def _drop_after(path: Path, step: int) -> None:
  """Leaves the lines up to a step. What was broken stays in a copy, for somebody to look at."""
  if not os.path.lexists(path):
    return
  lines, broken = _read(path)
  try:
    if broken:
      copy = files.unused(path.with_name('metrics-damaged.jsonl'))
      shutil.copyfile(path, copy)
      logging.warning('%s: line %d is broken and left out; %s has it', path, broken[0], copy)
    kept = [line for line in lines if line['step'] <= step]
    files.write_whole(path, ''.join(json.dumps(line) + '\n' for line in kept))
  except OSError as error:
    raise files.cannot(f'{path}: cannot be written', error, CURE) from error
