"""What the processes of one run (jax.distributed) decide together; alone, nothing is sent.

Each function is called by all of them at the same point, or the others wait for the missing one.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla.errors import MachineError, UserError, first_line


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


def largest(value: int) -> int:
  """The largest of the processes' numbers."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))
