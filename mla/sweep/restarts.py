"""How often a trial's process ended by itself: one that always does must not start for ever.

A process that was told to end (SIGTERM), or whose machine went, is not counted, so that a trial on
machines that come and go ends as on others; nor is what came before a further checkpoint.
"""

import atexit
import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mla import files
from mla.errors import UserError


@contextlib.contextmanager
def counting(
  path: Path, *, sweep: str, step: int, node: str, alive: Collection[str]
) -> Iterator[int]:
  """Gives the crashes before this process, and leaves in `path` what the next one will ask.

  `sweep` names the sweep's driver, whose predecessors' crashes don't count; `step` is the newest
  checkpoint; `node` this machine, and `alive` those that still are.
  """
  previous = _read(path)
  crashes = 0 if previous is None else count_crashes(previous, sweep, step, alive)
  start = {'sweep': sweep, 'step': step, 'node': node, 'crashes': crashes}

  def leave(told: bool) -> None:
    with contextlib.suppress(OSError):
      path.parent.mkdir(exist_ok=True)
      files.write_whole(path, json.dumps({**start, 'told': told}))

  leave(told=False)
  # A process that gets SIGTERM comes to Python's end; one that crashes, or is killed, does not.
  atexit.register(leave, told=True)
  try:
    yield crashes
  finally:
    atexit.unregister(leave)


def count_crashes(
  previous: Mapping[str, Any], sweep: str, step: int, alive: Collection[str]
) -> int:
  """The crashes now, by what the process before this one left; 0 once the trial got further."""
  if previous['sweep'] != sweep or step > previous['step']:
    return 0
  by_itself = not previous['told'] and previous['node'] in alive
  return previous['crashes'] + by_itself


def newest_step(workdir: Path) -> int:
  """That of its newest checkpoint; 0 if there is none."""
  names = (path.name for path in (workdir / 'checkpoints').glob('*'))
  return max((int(name) for name in names if name.isdecimal()), default=0)


def _read(path: Path) -> dict[str, Any] | None:
  """What a process left; None if none did, or it is damaged: it is no more than a count."""
  try:
    found = files.read_json(path, '')
  except UserError:
    return None
  types = {'sweep': str, 'step': int, 'node': str, 'told': bool, 'crashes': int}
  whole = isinstance(found, dict) and {name: type(found[name]) for name in found} == types
  return found if whole else None
