"""Causal attention by cuDNN's fused kernels, through JAX's public API: for NVIDIA GPUs.

The kernels take heads of one size, a multiple of 8, in bfloat16 or float16. So queries and keys are
concatenated of their parts, MLA's rotary key once a head, and where values are narrower than keys,
as MLA's are, or the other way round, the narrower ones get zeros, which the output loses again.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla.backends.per_device import per_device

WIDEST = 128  # dims of a head that the kernels take on every card, gradients included
DTYPES = (jnp.bfloat16, jnp.float16)


def missing() -> str:
  """Nothing: cuDNN comes with JAX for NVIDIA's GPUs."""
  return ''


def causal(
  queries: Sequence[Array],
  keys: Sequence[Array],
  values: Array,
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T H V']:
  """Causal attention; softmax in float32. No [T, T] array, no key or value repeated over heads."""
  groups, width = values.shape[2], _width(queries, values)
  if values.dtype not in DTYPES:
    raise NotImplementedError(f'it computes in bfloat16 or float16, not in {values.dtype}')
  if starts is not None:  # but for a bias [B, 1, T, T]
    raise NotImplementedError('its public interface has no documents within a row (data.packing)')
  if width > WIDEST:
    raise NotImplementedError(f'its heads have at most {WIDEST} dims, not {width}')
  whole = [jnp.broadcast_to(k, (*k.shape[:2], groups, k.shape[3])) for k in keys]
  length, odd = values.shape[1], values.shape[1] % 2  # gradients take even lengths only

  def padded(parts: Sequence[Array]) -> Array:
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.pad(joined, ((0, 0), (0, odd), (0, 0), (0, width - joined.shape[3])))

  def attend(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation='cudnn')
    return (out,)

  arrays = (padded(queries), padded(whole), padded([values]))
  (out,) = per_device(attend, arrays, ['BTH_', 'BTK_', 'BTK_'], ['BTH_'], groups)
  return out[:, :length, :, : values.shape[3]]


def _width(queries: Sequence[Array], values: Array) -> int:
  """Dims of a head as the kernels get it."""
  widest = max(sum(q.shape[3] for q in queries), values.shape[3])
  return -(-widest // 8) * 8
