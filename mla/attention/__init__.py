"""The switch between attention variants.

A variant is an nnx.Module built from (config, rngs), with impl, its config's attention_impl, and
four methods:
  cache_shapes()                         what it keeps per token: {name: shape}
  compress(x, positions)                 those things, for new tokens
  attend(x, entries, positions)          all tokens at once, for training and prefill
  attend_cached(x, cached, positions)    the newest tokens against the cache, for decoding
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from mla import backends
from mla.attention.grouped import GroupedAttention
from mla.attention.latent import LatentAttention
from mla.cache import Stored
from mla.errors import UserError

VARIANTS: dict[str, Callable[[ConfigDict, nnx.Rngs], Any]] = {
  'mha': GroupedAttention,
  'gqa': GroupedAttention,
  'mqa': GroupedAttention,
  'mla': LatentAttention,
}


def make_attention(config: ConfigDict, rngs: nnx.Rngs) -> Any:
  """The module that config.attention names; UserError if there is none."""
  if config.attention not in VARIANTS:
    raise UserError(f'attention={config.attention}: choose one of {", ".join(VARIANTS)}')
  return VARIANTS[config.attention](config, rngs)


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
