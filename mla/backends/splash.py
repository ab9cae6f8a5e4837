"""Causal attention by splash attention, JAX's kernels for TPUs (jax.experimental.pallas.ops.tpu).

They take queries and keys of one size and values of another, whole blocks of 128 tokens, read a
group's key and value for all its query heads, and skip the blocks above the diagonal. Queries and
keys are concatenated of their parts: MLA's rotary key is written once a head, [B,T,H,N+R] where
[B,T,H,N] and [B,T,R] would do. That is R/N more than its expanded keys take anyway.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  BlockSizes,
  CausalMask,
  MultiHeadMask,
  SegmentIds,
  make_splash_mha_single_device,
)
from jaxtyping import Array, Float, Int

from mla.backends.per_device import per_device
from mla.remat import ATTENTION

LANES = 128  # tokens a block are a multiple of it
BLOCK = 512  # tokens a block at most: its float32 scores are 1 MiB of the chip's 16 or more
WIDEST = 2048  # bytes of a head's key and value for which such blocks fit on a v4, which has 16 MiB
DTYPES = (jnp.float32, jnp.bfloat16)
INTERPRET = False  # for tests on a CPU


def missing() -> str:
  """Nothing: the kernels are part of JAX."""
  return ''


def causal(
  queries: Sequence[Array],
  keys: Sequence[Array],
  values: Array,
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T H V']:
  """Causal attention; softmax in float32. No [T, T] array, no key or value repeated over heads.

  Where a document starts is its segment's number: tokens see those of their own.
  """
  if values.dtype not in DTYPES:
    raise NotImplementedError(f'it computes in float32 or bfloat16, not in {values.dtype}')
  length, groups = values.shape[1:3]
  width = values.dtype.itemsize * (sum(q.shape[3] for q in queries) + values.shape[3])
  if width > WIDEST:
    raise NotImplementedError(f'a key and a value have at most {WIDEST} bytes, not {width}')
  whole = [jnp.broadcast_to(k, (*k.shape[:2], groups, k.shape[3])) for k in keys]
  scaled = [(q.astype(jnp.float32) * scale).astype(q.dtype) for q in queries]
  block, fill = _blocks(length)

  def padded(parts: Sequence[Array]) -> Array:
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.pad(joined, ((0, 0), (0, fill), (0, 0), (0, 0)))  # seen by no real query

  def attend(*arrays: Array) -> tuple[Array, ...]:
    q, k, v = (x.swapaxes(1, 2) for x in arrays[:3])
    kernel = _kernel(q.shape[1], q.shape[2], block)
    segments = [SegmentIds(number, number) for number in arrays[3:]]
    return (jax.vmap(kernel)(q, k, v, *segments).swapaxes(1, 2),)

  arrays = [padded(scaled), padded(whole), padded([values])]
  axes = ['BTH_', 'BTK_', 'BTK_']
  if starts is not None:
    arrays.append(jnp.pad(starts, ((0, 0), (0, fill))))
    axes.append('BT')
  (out,) = per_device(attend, arrays, axes, ['BTH_'], groups)
  return out[:, :length]


def _blocks(length: int) -> tuple[int, int]:
  """(tokens a block, tokens to add): as few blocks as there can be, all of one size.

  Blocks of what divides the length could be as small as 128 tokens, which leave the matrix unit
  idle.
  """
  count = -(-length // BLOCK)
  block = -(-length // (count * LANES)) * LANES
  return block, count * block - length


def _kernel(heads: int, length: int, block: int):
  """Of [H,T,dims] queries, [K,T,dims] keys and values, forward and backward."""
  blocks = BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return make_splash_mha_single_device(
    mask=MultiHeadMask([CausalMask((length, length))] * heads),
    block_sizes=blocks,
    residual_checkpoint_name=ATTENTION,
    interpret=INTERPRET,
  )
