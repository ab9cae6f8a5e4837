"""Causal attention by splash attention, JAX's kernels for TPUs (jax.experimental.pallas.ops.tpu).

They take queries and keys of one size and values of another, whole blocks of 128 tokens, and skip
the blocks above the diagonal. Queries and keys are concatenated of their parts: MLA's rotary key is
written once a head, a third more of what its keys without position take.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  BlockSizes,
  CausalMask,
  MultiHeadMask,
  make_splash_mha_single_device,
)
from jaxtyping import Array, Float

from mla.backends.per_device import per_query_head

LANES = 128  # tokens a block are a multiple of it
BLOCK = 512  # tokens a block at most: its float32 scores are 1 MiB of the chip's 16 or more
INTERPRET = False  # for tests on a CPU


def missing() -> str:
  """Nothing: the kernels are part of JAX."""
  return ''


def causal(
  queries: Sequence[Array], keys: Sequence[Array], values: Array, scale: float
) -> Float[Array, 'B T H V']:
  """Causal attention; softmax in float32. No [T, T] array, no key or value repeated over heads."""
  if values.dtype.itemsize > 4:
    raise NotImplementedError(f'it computes in float32 and below, not in {values.dtype}')
  length, groups = values.shape[1:3]
  whole = [jnp.broadcast_to(k, (*k.shape[:2], groups, k.shape[3])) for k in keys]
  scaled = [(q.astype(jnp.float32) * scale).astype(q.dtype) for q in queries]

  def padded(parts: Sequence[Array]) -> Array:
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.pad(joined, ((0, 0), (0, -length % LANES), (0, 0), (0, 0)))

  def attend(q: Array, k: Array, v: Array) -> Array:
    kernel = _kernel(q.shape[1], q.shape[2])
    return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

  out = per_query_head(attend, padded(scaled), padded(whole), padded([values]))
  return out[:, :length].astype(values.dtype)


def _kernel(length: int, heads: int):
  """Of [H,T,dims] queries, [K,T,dims] keys and values, forward and backward."""
  block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
  names = 'q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq'.split()
  return make_splash_mha_single_device(
    mask=MultiHeadMask([CausalMask((length, length))] * heads),
    block_sizes=BlockSizes(**{f'block_{name}': block for name in names}),
    interpret=INTERPRET,
  )
