"""The switch between attention variants.

A variant is an nnx.Module built from (config, rngs), with impl, its config's attention_impl, and
four methods:
  cache_shapes()                                 what it keeps per token: {name: shape}
  compress(x, positions)                         those things, for new tokens
  attend(x, entries, positions, starts)          all tokens at once, for training and prefill
  attend_cached(x, cached, positions, starts)    the newest tokens against the cache, for decoding
Beside its module stands a Variant (variant.py): its rules, its label, what its paper says it keeps.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from mla import backends
from mla.attention.grouped import GQA, MHA, MQA
from mla.attention.nested import MLA
from mla.attention.variant import Variant
from mla.cache import Stored

# By what config.attention calls it; pictures give out colours in this order.
VARIANTS: dict[str, Variant] = {
  'mha': MHA,
  'gqa': GQA,
  'mqa': MQA,
  'mla': MLA,
}


def make_attention(config: ConfigDict, rngs: nnx.Rngs) -> Any:
  """The module that config.attention names, of a config that keeps its rules (mla/config.py)."""
  return VARIANTS[config.attention].module(config, rngs)


def append(
  layer: dict[str, Stored], entries: Mapping[str, Array], starts: Array, *, impl: str = 'auto'
) -> dict[str, Stored]:
  """What compress() gave of T new tokens, [B,T,*shape] each, written into a layer's cache.

  See backends.append for what does not fit.
  """
  return {
    name: backends.append(stored, entries[name], starts, impl=impl)
    for name, stored in layer.items()
  }
