"""softmax(Q K^T) V: causal over whole sequences, and read from a cache for decoding.

Both take grouped heads without repeating keys or values, key and value heads of different sizes,
scores that are the sum over several parts of queries and keys, and keep the softmax in float32. On
a CPU both run in C++ (native/), elsewhere as XLA operations.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla import native
from mla.attention import blockwise
from mla.cache import Stored

_counted = False


@contextlib.contextmanager
def counted() -> Iterator[None]:
  """While it lasts, attention is traced so that XLA sees all its FLOPs: one block, no C++."""
  global _counted
  _counted = True
  try:
    yield
  finally:
    _counted = False


def causal_attention(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Float[Array, 'B T _ _']],
  values: Float[Array, 'B T K V'],
  *,
  scale: float,
) -> Float[Array, 'B T H V']:
  """Causal attention of T tokens among themselves; query head h reads key head h // (H/K).

  The score is scale times the sum over i of <queries[i], keys[i]>: MLA's has a part per head and a
  rotary part, the grouped variants' only one. keys[i] has K heads, or one that all heads share.
  Memory is linear in T, gradients included.
  """
  if native.usable() and not _counted:
    arrays = [x.astype(jnp.float32) for x in (*queries, *keys, values)]
    return _native(scale, *arrays).astype(values.dtype)
  groups = values.shape[2]
  whole = [jnp.broadcast_to(k, (*k.shape[:2], groups, k.shape[3])) for k in keys]
  q, k = (jnp.concatenate(parts, axis=-1) for parts in (queries, whole))
  return blockwise.causal(q, k, values, scale=scale, block=q.shape[1] if _counted else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(scale: float, *arrays: Array) -> Float[Array, 'B T H V']:
  return _native_forward(scale, *arrays)[0]


def _native_forward(scale, *arrays):
  parts = len(arrays) // 2
  out, log_sums = native.causal(arrays[:parts], arrays[parts:-1], arrays[-1], scale)
  return out, (arrays, out, log_sums)


def _native_backward(scale, saved, d_out):
  arrays, out, log_sums = saved
  parts = len(arrays) // 2
  gradients = native.causal_gradients(
    arrays[:parts], arrays[parts:-1], arrays[-1], out, log_sums, d_out, scale
  )
  return tuple(
    jnp.sum(gradient, axis=2, keepdims=True) if x.shape[2] < gradient.shape[2] else gradient
    for x, gradient in zip(arrays, gradients, strict=True)
  )


_native.defvjp(_native_forward, _native_backward)


def cached_attention(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Stored],
  values: Stored,
  positions: Int[Array, 'B T'],
  *,
  scale: float,
) -> Float[Array, 'B T H V']:
  """Attention of T new tokens to a cache whose slot s holds the token of position s.

  The score is the sum over i of <queries[i], keys[i]>: MLA's has a latent and a rotary part, the
  grouped variants' only one. keys[i] is [B, K, S, dims]; a query at position p sees the slots up to
  p. An int8 cache is never expanded: its scales multiply scores and weights.
  """
  dtype = queries[0].dtype
  if native.usable() and not _counted:
    wide = [query.astype(jnp.float32) for query in queries]
    return native.cached(wide, keys, values, positions, scale).astype(dtype)
  batch, length, heads, _ = queries[0].shape
  groups = values.values.shape[1]
  scores = jnp.zeros((), jnp.float32)
  for query, key in zip(queries, keys, strict=True):
    rows = (query * scale).reshape(batch, length, groups, heads // groups, -1)
    part = blockwise.dot('btkgn,bksn->bkgts', rows, key.values.astype(query.dtype))
    scores += part if key.scale is None else part * key.scale[:, :, None, None, :]
  slots = jnp.arange(values.values.shape[2])
  visible = slots <= positions[:, None, None, :, None]
  scores = jnp.where(visible, scores, -jnp.inf)
  # Divided by their total only after they met the values: one pass over the slots less.
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if values.scale is not None:
    weights *= values.scale[:, :, None, None, :]
  # The output keeps the operands' order; any other makes XLA's CPU backend transpose the values.
  out = blockwise.dot('bkgts,bksv->bkgtv', weights.astype(dtype), values.values.astype(dtype))
  return jnp.moveaxis(out / total, 3, 1).reshape(batch, length, heads, -1).astype(dtype)
