"""What the processes of one run (jax.distributed) decide together; alone, nothing is sent.

Each function is called by all of them at the same point, or the others wait for the missing one.
"""

import atexit
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla.errors import MachineError, UserError, first_line

HEARTBEAT = 20  # seconds of silence after which a process counts as gone
SAID = b'.'  # to the process that would have the last word: there is nothing left to say
GATHERING = 300  # seconds that processes wait for each other at the start


def join(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
  """Makes this process one of several of one run, before JAX is used; None is found out.

  Cloud TPU, Slurm, Open MPI and Kubernetes tell; in a program that Ray has joined already nothing
  is left to do. UserError where the flags are needed or wrong, MachineError if the others do not
  come within GATHERING seconds.
  """
  if jax.distributed.is_initialized():
    return
  if coordinator is not None and not re.fullmatch(r'[^:]+:\d+|\[[0-9a-fA-F:]+\]:\d+', coordinator):
    raise UserError(f'--coordinator={coordinator}: write HOST:PORT of process 0, a port it may use')
  writer = _leave_a_word()
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=GATHERING,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  except (ValueError, TypeError) as error:
    os.write(writer, SAID)
    raise UserError(
      f'--multihost: the other processes are not known ({first_line(error)}); give each '
      '--coordinator=HOST:PORT, --num_processes=N and --process_id=0 to N-1'
    ) from error
  except RuntimeError as error:
    os.write(writer, SAID)
    where = 'the coordinator' if coordinator is None else f'--coordinator={coordinator}'
    raise MachineError(
      f'--multihost: the processes have not found each other at {where} ({first_line(error)}); '
      'start all of them within five minutes, each with a --process_id of its own'
    ) from error
  atexit.register(_end, writer)


def _end(writer: int) -> None:
  """Parts from the others, which may end in abort() too, before nothing is left to say."""
  jax.distributed.shutdown()
  os.write(writer, SAID)


def _leave_a_word() -> int:
  """Starts a process that says in one line, should this one be cut short, what to do.

  It keeps silent once SAID is written to the pipe returned. JAX ends a process whose peers are gone
  with abort(), which no Python survives.
  """
  reader, writer = os.pipe()
  if os.fork():
    os.close(reader)
    return writer
  os.close(writer)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  if not os.read(reader, 1):
    os.write(
      2,
      b'error: this process of the run was cut short: another one has gone, or it was killed; what '
      b'was saved is whole, so start all of them again, and they go on from there\n',
    )
  os._exit(0)


def is_first() -> bool:
  """Whether this is the process that writes what only one should."""
  return jax.process_index() == 0


def first_decides(decide: Callable[[], Any]) -> Any:
  """What decide() returns in the first process (as JSON keeps it), in all; what it raises, too."""
  if jax.process_count() == 1:
    return decide()
  answer: dict[str, Any] = {}
  failure: Exception | None = None
  if is_first():
    try:
      answer = {'value': decide()}
    except Exception as error:
      failure = error
      answer = {'users': isinstance(error, UserError), 'error': str(error) or first_line(error)}
  answer = json.loads(_from_first(json.dumps(answer).encode()))
  if failure is not None:
    raise failure
  if 'error' in answer:
    raise (UserError if answer['users'] else MachineError)(answer['error'])
  return answer['value']


def _from_first(content: bytes) -> bytes:
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  mine = np.frombuffer(content, np.uint8).astype(np.int32)
  sent = multihost_utils.broadcast_one_to_all(mine if is_first() else np.zeros(size, np.int32))
  return np.asarray(sent).astype(np.uint8).tobytes()


def check_same(what: str, value: str) -> None:
  """UserError, in all of them, if a process has another value than the first; `what` names it."""
  if jax.process_count() == 1:
    return
  mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8).astype(np.int32)
  all_of_them = np.asarray(multihost_utils.process_allgather(mine))
  others = [str(i) for i, its in enumerate(all_of_them) if (its != all_of_them[0]).any()]
  if others:
    which = ', '.join(others)
    raise UserError(
      f'{what}: process {which} of the run has other ones than process 0; give each the same files'
    )


def whole(array: jax.Array) -> np.ndarray:
  """All of an array whose parts lie with several processes, in each of them."""
  if jax.process_count() == 1:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def largest(value: int) -> int:
  """The largest of the processes' numbers."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))
