"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

The cache keeps, per token and layer, the normed latent [C] and one rotary key [R] shared by all
heads. Training and prefill expand the latent to keys and values per head. Decoding never does: the
up-projections are absorbed into the query and the output, and attention runs in the latent space,
which is the same function because the products associate:

  <q_h, W_uk_h c> = <W_uk_h^T q_h, c>      and      sum_s a_s W_uv_h c_s = W_uv_h (sum_s a_s c_s)
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla.attention.rope import Positions, rope, rotation_of
from mla.attention.variant import Rule, Variant, even_rope
from mla.backends import Starts, cached_attention, causal_attention
from mla.cache import Shapes, Stored
from mla.layers import RMSNorm, project, weight


class LatentAttention(nnx.Module):
  """Weights carry the paper's names; shapes are in the house's axis letters."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    D, H, N, R = config.d_model, config.num_heads, config.head_dim, config.rope_dim
    C, Q = config.latent_dim, config.query_latent_dim
    V = config.value_head_dim or N
    self.rotation = rotation_of(config)
    self.impl = config.attention_impl
    self.nope_dim = N
    self.shapes = nnx.static({'latent': (C,), 'k_rope': (R,)})
    self.scale = (N + R) ** -0.5 * self.rotation.sharpness
    self.w_dkv = weight(rngs, fan_in=D, D=D, C=C)
    # The norm fixes the latent's scale, so that a sweep over C does not sweep that of k and v too.
    # A compressed model has none: its keys and values are linear in the input.
    if config.latent_norm:
      self.latent_norm = RMSNorm(C=C)
    self.w_uk = weight(rngs, fan_in=C, C=C, H=H, N=N)
    self.w_uv = weight(rngs, fan_in=C, C=C, H=H, V=V)
    self.w_kr = weight(rngs, fan_in=D, D=D, R=R)
    if Q:
      self.w_dq = weight(rngs, fan_in=D, D=D, Q=Q)
      self.query_norm = RMSNorm(Q=Q)
      self.w_uq = weight(rngs, fan_in=Q, Q=Q, H=H, N=N + R)
    else:
      self.w_q = weight(rngs, fan_in=D, D=D, H=H, N=N + R)
    self.w_o = weight(rngs, fan_in=H * V, scale=(2 * config.num_layers) ** -0.5, H=H, V=V, D=D)

  def cache_shapes(self) -> Shapes:
    return self.shapes

  def compress(self, x: Float[Array, 'B T D'], positions: Positions) -> dict[str, Array]:
    """What the cache keeps of each token: normed latent [B,T,C], turned key [B,T,R] (eq. 9, 15)."""
    return {**self._latents(x), 'k_rope': rope(project(x, self.w_kr), positions, self.rotation)}

  def _latents(self, x: Float[Array, 'B T D']) -> dict[str, Array]:
    """The normed latent, in the parts that it is kept in."""
    latent = project(x, self.w_dkv)
    return {'latent': self.latent_norm(latent) if hasattr(self, 'latent_norm') else latent}

  def attend(
    self,
    x: Float[Array, 'B T D'],
    entries: dict[str, Array],
    positions: Positions,
    starts: Starts = None,
  ) -> Float[Array, 'B T D']:
    """Expanded: tokens attend to those before them, keys and values per head (eq. 10-19)."""
    latent = jnp.concatenate([entries[name] for name in self._parts()], axis=-1)
    keys = [project(latent, self.w_uk), entries['k_rope'][:, :, None, :]]
    values = project(latent, self.w_uv)
    queries = self._queries(x, positions)
    out = causal_attention(queries, keys, values, scale=self.scale, starts=starts, impl=self.impl)
    return project(out, self.w_o, inputs=2)

  def attend_cached(
    self,
    x: Float[Array, 'B T D'],
    cached: dict[str, Stored],
    positions: Int[Array, 'B T'],
    starts: Starts = None,
  ) -> Float[Array, 'B T D']:
    """Absorbed: the T newest tokens, already in the cache, attend to its latents as they lie."""
    q_nope, q_rope = self._queries(x, positions)
    q_latent = jnp.einsum('bthn,chn->bthc', q_nope, self.w_uk[...].astype(x.dtype))
    latents = [_one_head(cached[name]) for name in self._parts()]
    ends = np.cumsum([stored.values.shape[-1] for stored in latents])
    queries = [*jnp.split(q_latent, ends[:-1], axis=-1), q_rope]
    keys = [*latents, _one_head(cached['k_rope'])]
    mixed = cached_attention(
      queries, keys, latents, positions, scale=self.scale, starts=starts, impl=self.impl
    )
    out = jnp.einsum('bthc,chv->bthv', mixed, self.w_uv[...].astype(x.dtype))
    return project(out, self.w_o, inputs=2)

  def _parts(self) -> list[str]:
    """The latent's, in order; that of a dict which JAX has taken apart is the alphabet's."""
    return [name for name in self.shapes if name != 'k_rope']

  def scores(
    self, x: Float[Array, 'B T D'], entries: dict[str, Array], positions: Positions
  ) -> tuple[Float[Array, 'B H T T'], Float[Array, 'B H T T']]:
    """Logits of all pairs, by content and by position; softmax sees their sum (mla/inside.py)."""
    q_nope, q_rope = self._queries(x, positions)
    latent = jnp.concatenate([entries[name] for name in self._parts()], axis=-1)
    content = jnp.einsum('bthn,chn,bsc->bhts', q_nope, self.w_uk[...], latent)
    rotary = jnp.einsum('bthr,bsr->bhts', q_rope, entries['k_rope'])
    return self.scale * content, self.scale * rotary

  def _queries(
    self, x: Float[Array, 'B T D'], positions: Positions
  ) -> tuple[Float[Array, 'B T H N'], Float[Array, 'B T H R']]:
    """The position-free and the rotary part of each head's query (eq. 12-14, 37-38)."""
    if hasattr(self, 'w_q'):
      q = project(x, self.w_q)
    else:
      q = project(self.query_norm(project(x, self.w_dq)), self.w_uq)
    q_nope, q_rope = jnp.split(q, [self.nope_dim], axis=-1)
    return q_nope, rope(q_rope, positions, self.rotation)


def _one_head(stored: Stored) -> Stored:
  """[B, S, dims] as [B, 1, S, dims]: all query heads read the same vectors."""
  scale = None if stored.scale is None else stored.scale[:, None]
  return Stored(stored.values[:, None], scale)


def _rules(config: ConfigDict) -> Iterator[Rule]:
  yield config.latent_dim > 0, 'latent_dim', 'mla needs the width of its latent'
  yield config.rope_dim > 0, 'rope_dim', 'mla needs a shared rotary key; try 32'
  yield even_rope(config)


def _vectors(config: ConfigDict) -> list[int]:
  """d_c + d_h^R elements (table 1)."""
  return [config.latent_dim, config.rope_dim]


MLA = Variant(
  LatentAttention, 'MLA', ('latent_dim', 'rope_dim', 'query_latent_dim'), _rules, _vectors
)
