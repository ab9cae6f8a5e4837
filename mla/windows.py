"""Windows as the pipeline makes them: what a model reads of them, and what it is asked for.

A window of text is T + 1 tokens: each but the last is read, each but the first is a target.

A window of a probe (mla/probes.py) is [T, parts + 1]: a position reads `parts` tokens, whose
embeddings are added up, and its last number is the target. NONE is no token, or no target.
"""

from typing import Any

from jaxtyping import Bool, Int

NONE = -1


def are_text(windows: Any) -> bool:
  """Whether a batch of windows, or what tells its shape, is of text."""
  return len(windows.shape) == 2


def inputs_and_targets(
  windows: Int[Any, 'B window *row'],
) -> tuple[Int[Any, 'B T *parts'], Int[Any, 'B T']]:
  """What is read at each position, and the target there."""
  if are_text(windows):
    return windows[:, :-1], windows[:, 1:]
  return windows[..., :-1], windows[..., -1]


def scored(targets: Int[Any, 'B T']) -> Bool[Any, 'B T']:
  """Which positions have a target, of a probe's."""
  return targets != NONE
