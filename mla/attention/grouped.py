"""Multi-head, grouped-query, multi-query attention: one module, K = H, G or 1 key/value heads."""

from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla.attention.rope import Positions, rope, rotation_of
from mla.attention.variant import Rule, Variant, even_rope
from mla.backends import Starts, cached_attention, causal_attention
from mla.cache import Shapes, Stored
from mla.layers import project, weight


class GroupedAttention(nnx.Module):
  """Vaswani et al. 2017 (K=H), Ainslie et al. 2023 (1<K<H), Shazeer 2019 (K=1), with RoPE.

  Keeps 2 K N elements a token and layer when V = N.
  """

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    D, H, N = config.d_model, config.num_heads, config.head_dim
    K = key_heads(config)
    V = config.value_head_dim or N
    self.rotated = config.rope_dim or N
    self.rotation = rotation_of(config)
    self.impl = config.attention_impl
    self.shapes = nnx.static({'k': (K, N), 'v': (K, V)})
    self.scale = N**-0.5
    self.w_q = weight(rngs, fan_in=D, D=D, H=H, N=N)
    self.w_k = weight(rngs, fan_in=D, D=D, K=K, N=N)
    self.w_v = weight(rngs, fan_in=D, D=D, K=K, V=V)
    self.w_o = weight(rngs, fan_in=H * V, scale=(2 * config.num_layers) ** -0.5, H=H, V=V, D=D)

  def cache_shapes(self) -> Shapes:
    return self.shapes

  def compress(self, x: Float[Array, 'B T D'], positions: Positions) -> dict[str, Array]:
    """What the cache keeps of each token: rotated keys [B,T,K,N] and values [B,T,K,V]."""
    return {'k': self._rotate(project(x, self.w_k), positions), 'v': project(x, self.w_v)}

  def attend(
    self,
    x: Float[Array, 'B T D'],
    entries: dict[str, Array],
    positions: Positions,
    starts: Starts = None,
  ) -> Float[Array, 'B T D']:
    """Every token attends to those before it, in parallel."""
    q = self._rotate(project(x, self.w_q), positions)
    out = causal_attention(
      [q], [entries['k']], entries['v'], scale=self.scale, starts=starts, impl=self.impl
    )
    return project(out, self.w_o, inputs=2)

  def attend_cached(
    self,
    x: Float[Array, 'B T D'],
    cached: dict[str, Stored],
    positions: Int[Array, 'B T'],
    starts: Starts = None,
  ) -> Float[Array, 'B T D']:
    """The T newest tokens, already in the cache, attend to all it holds."""
    q = self._rotate(project(x, self.w_q), positions)
    keys, values = [cached['k']], [cached['v']]
    out = cached_attention(
      [q], keys, values, positions, scale=self.scale, starts=starts, impl=self.impl
    )
    return project(out, self.w_o, inputs=2)

  def logits(
    self, x: Float[Array, 'B T D'], entries: dict[str, Array], positions: Positions
  ) -> Float[Array, 'B H T T']:
    """What softmax sees, of all pairs, later tokens among them (mla/convert/compress.py)."""
    q = self._rotate(project(x, self.w_q), positions)
    k = entries['k'].repeat(q.shape[2] // entries['k'].shape[2], axis=2)
    return self.scale * jnp.einsum('bthn,bshn->bhts', q, k)

  def _rotate(self, heads: Array, positions: Positions) -> Array:
    if self.rotated == heads.shape[-1]:
      return rope(heads, positions, self.rotation)
    turned, kept = jnp.split(heads, [self.rotated], axis=-1)
    return jnp.concatenate([rope(turned, positions, self.rotation), kept], axis=-1)


def key_heads(config: ConfigDict) -> int:
  """K of a grouped variant."""
  return {'mha': config.num_heads, 'mqa': 1}.get(config.attention, config.num_kv_heads)


def _rules(config: ConfigDict) -> Iterator[Rule]:
  if config.attention == 'gqa':
    fits = config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads == 0
    yield fits, 'num_kv_heads', f'gqa needs a number that divides num_heads={config.num_heads}'
  cure = f'cannot rotate more than head_dim={config.head_dim}; 0 rotates all'
  yield config.rope_dim <= config.head_dim, 'rope_dim', cure
  whole = config.rope_dim == 0
  yield not whole or config.head_dim % 2 == 0, 'head_dim', 'must be even to rotate in pairs'
  yield even_rope(config)


def _vectors(config: ConfigDict) -> list[int]:
  """2 K d_h elements (DeepSeek-V2, arXiv 2405.04434, table 1), where values are as wide as keys."""
  K, V = key_heads(config), config.value_head_dim or config.head_dim
  return [config.head_dim] * K + [V] * K


MHA = Variant(GroupedAttention, 'MHA', ('rope_dim',), _rules, _vectors)
GQA = Variant(GroupedAttention, 'GQA', ('num_kv_heads', 'rope_dim'), _rules, _vectors)
MQA = Variant(GroupedAttention, 'MQA', ('rope_dim',), _rules, _vectors)
