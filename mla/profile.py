"""A trace of some training steps, for TensorBoard and xprof."""

import contextlib
from pathlib import Path
from typing import Any

import jax

STEP = 'training step'  # its name in the trace, beside its number
SKIPPED = 2  # steps of a run's start, in which the host and the heap still settle


class Trace:
  """Traces `steps` steps (0: none) of a run that goes on from `start`, into a folder.

  The trace lies in the folder's plugins/profile, where TensorBoard looks for it. A run that ends
  within leaves what it had.
  """

  def __init__(self, folder: Path, start: int, steps: int):
    self.first = start + 1 + SKIPPED
    self.last = self.first + steps - 1
    self._folder = folder
    self._running = False

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """To be open while the step of this number is begun."""
    if self.first <= number <= self.last and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    if self._running:
      return jax.profiler.StepTraceAnnotation(STEP, step_num=number)
    return contextlib.nullcontext()

  def begun(self, number: int, result: Any) -> bool:
    """After step(): ends with the last step's result, and says so."""
    if not self._running or number < self.last:
      return False
    jax.block_until_ready(result)
    self.close()
    return True

  def close(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
