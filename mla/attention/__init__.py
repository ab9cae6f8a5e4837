"""The switch between attention variants.

A variant is an nnx.Module built from (config, rngs) with four methods:
  cache_shapes()                         what it keeps per token: {name: shape}
  compress(x, positions)                 those things, for new tokens
  attend(x, entries, positions)          all tokens at once, for training and prefill
  attend_cached(x, cached, positions)    the newest tokens against the cache, for decoding
"""

from flax import nnx
from ml_collections import ConfigDict

from mla.attention.grouped import GroupedAttention
from mla.attention.latent import LatentAttention

VARIANTS: dict[str, type[GroupedAttention] | type[LatentAttention]] = {
  'mha': GroupedAttention,
  'gqa': GroupedAttention,
  'mqa': GroupedAttention,
  'mla': LatentAttention,
}


def make_attention(config: ConfigDict, rngs: nnx.Rngs) -> GroupedAttention | LatentAttention:
  return VARIANTS[config.attention](config, rngs)
