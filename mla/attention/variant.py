"""What a variant says of itself, so that no other room has to know it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

Rule = tuple[bool, str, str]
"""Whether it holds; the field that breaks it; what to do, as the end of 'FIELD=VALUE: ...'."""


class Variant(NamedTuple):
  """An attention variant: its module (mla/attention), and all that is its own."""

  module: Callable[[ConfigDict, nnx.Rngs], Any]
  # In tables and pictures.
  label: str
  # Those of the config's fields that it reads and other variants may not: integers, 0 or positive.
  # One that configs/base.py lacks stands in the variant's own config.
  fields: tuple[str, ...]
  # What a config of this variant must keep, the first one first; each may count on those before it.
  rules: Callable[[ConfigDict], Iterator[Rule]]
  # The widths of the vectors that its paper keeps of a token and layer. Nothing but the tests reads
  # it: they hold the arrays against it.
  vectors: Callable[[ConfigDict], list[int]]


def even_rope(config: ConfigDict) -> Rule:
  """The rule of all that rotate."""
  return config.rope_dim % 2 == 0, 'rope_dim', 'must be even: dims rotate in pairs'
