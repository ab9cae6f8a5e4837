"""Attention and its cache as operations of XLA: runs everywhere, the reference of the others.

What the functions take and give is said, and checked, in backends/__init__.py.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from mla.cache import Stored
from mla.remat import ATTENTION
from mla.sharding import rule

# Tokens a block. Small blocks waste less of the diagonal's masked half and stay in a core's cache,
# large ones make fewer and better matmuls. Measured on CPU: docs/log.md.
SHORT_BLOCK, LONG_BLOCK, SHORT = 64, 256, 512

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal(
  queries: Sequence[Array],
  keys: Sequence[Array],
  values: Array,
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
  *,
  block: int = 0,
) -> Float[Array, 'B T H V']:
  """Causal attention; softmax in float32.

  A block of queries visits the blocks of keys up to its own and no others, with a running softmax;
  the backward pass recomputes the probabilities from the saved log-sum-exp (FlashAttention, Dao et
  al. 2022, arXiv 2205.14135). So memory is linear in T, gradients included. block=0 chooses.
  With `starts` scores of earlier keys are masked.
  """
  batch, length, heads, _ = queries[0].shape
  groups = values.shape[2]
  whole = [jnp.broadcast_to(k, (*k.shape[:2], groups, k.shape[3])) for k in keys]
  q, k = (jnp.concatenate(parts, axis=-1) for parts in (queries, whole))
  block = min(block or (SHORT_BLOCK if length <= SHORT else LONG_BLOCK), length)
  fill = ((0, 0), (0, -length % block), (0, 0), (0, 0))  # no real query sees the padding's keys
  q, k, v = (jnp.pad(x, fill) for x in (q * scale, k, values))
  grouped = q.reshape(*q.shape[:2], groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
  starts = None if starts is None else jnp.pad(starts, fill[:2])[..., None]
  out = _blockwise(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), starts, block)
  out = out.transpose(0, 3, 1, 2, 4)[:, :length]
  return out.reshape(batch, length, heads, -1)


def _cut(x: Array, index: Array, block: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=-2)


def _scores(
  q: Float[Array, 'B K G t n'],
  k: Float[Array, 'B K s n'],
  row: Array,
  column: Array,
  starts: Int[Array, 'B t 1'] | None,
) -> Float[Array, 'B K G t s']:
  """Masked float32 scores of one block of queries against one of keys."""
  size = k.shape[2]
  block = jnp.arange(size, dtype=jnp.int32)
  visible = (column * size + block[None] <= row * size + block[:, None])[None]
  if starts is not None:
    visible &= column * size + block[None, None] >= starts
  return jnp.where(visible[:, None, None], dot('bkgtn,bksn->bkgts', q, k), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(
  q: Float[Array, 'B K G T n'],
  k: Float[Array, 'B K T n'],
  v: Float[Array, 'B K T V'],
  starts: Int[Array, 'B T 1'] | None,
  block: int,
) -> Float[Array, 'B K G T V']:
  return _blockwise_forward(q, k, v, starts, block)[0]


def _blockwise_forward(q, k, v, starts, block):
  def attend_row(_, row):
    queries = _cut(q, row, block)
    firsts = None if starts is None else _cut(starts, row, block)

    def attend_block(turn, carry):
      # Masked from both sides, the diagonal's block comes first: there each query sees a key.
      column = turn if starts is None else row - turn
      top, total, out = carry
      values = _cut(v, column, block)
      scores = _scores(queries, _cut(k, column, block), row, column, firsts)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
      total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
      out = out * shrink + dot('bkgts,bksv->bkgtv', weights.astype(v.dtype), values)
      return new_top, total, out

    zeros = jnp.zeros((*queries.shape[:-1], 1), jnp.float32)
    start = (zeros - jnp.inf, zeros, jnp.zeros((*queries.shape[:-1], v.shape[-1]), jnp.float32))
    top, total, out = jax.lax.fori_loop(0, row + 1, attend_block, start)
    return None, ((out / total).astype(v.dtype), top + jnp.log(total))

  _, rows = jax.lax.scan(attend_row, None, jnp.arange(q.shape[3] // block, dtype=jnp.int32))
  out, log_sum = (checkpoint_name(_join_rows(x), ATTENTION) for x in rows)
  return out, (q, k, v, starts, out, log_sum)


def _blockwise_backward(block, saved, d_out):
  q, k, v, starts, out, log_sum = saved
  # d_scores = weights * (d_weights - sum_s weights * d_weights), and that sum is <out, d_out>.
  mean = dot('bkgtv,bkgtv->bkgt', out, d_out)[..., None]

  def row_gradients(carry, row):
    queries, d_rows, log_sums, means = (_cut(x, row, block) for x in (q, d_out, log_sum, mean))
    firsts = None if starts is None else _cut(starts, row, block)

    def block_gradients(column, carry):
      d_q, d_k, d_v = carry
      keys, values = _cut(k, column, block), _cut(v, column, block)
      weights = jnp.exp(_scores(queries, keys, row, column, firsts) - log_sums)
      d_weights = dot('bkgtv,bksv->bkgts', d_rows, values)
      d_scores = (weights * (d_weights - means)).astype(q.dtype)
      d_q += dot('bkgts,bksn->bkgtn', d_scores, keys)
      d_k = _add(d_k, dot('bkgts,bkgtn->bksn', d_scores, queries), column, block)
      d_v = _add(d_v, dot('bkgts,bkgtv->bksv', weights.astype(v.dtype), d_rows), column, block)
      return d_q, d_k, d_v

    start = (jnp.zeros(queries.shape, jnp.float32), *carry)
    d_q, *carry = jax.lax.fori_loop(0, row + 1, block_gradients, start)
    return tuple(carry), d_q

  start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
  (d_k, d_v), d_q = jax.lax.scan(
    row_gradients, start, jnp.arange(q.shape[3] // block, dtype=jnp.int32)
  )
  return _join_rows(d_q).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _join_rows(rows: Float[Array, 'rows B K G t n']) -> Float[Array, 'B K G T n']:
  rows = jnp.moveaxis(rows, 0, 3)
  return rows.reshape(*rows.shape[:3], -1, rows.shape[-1])


def _add(total: Array, part: Array, index: Array, block: int) -> Array:
  part += _cut(total, index, block)
  return jax.lax.dynamic_update_slice_in_dim(total, part, index * block, axis=-2)


def cached(
  queries: Sequence[Array],
  keys: Sequence[Stored],
  values: Sequence[Stored],
  positions: Int[Array, 'B T'],
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T H V']:
  """Attention through a cache, in the queries' dtype; softmax in float32."""
  dtype = queries[0].dtype
  batch, length, heads, _ = queries[0].shape
  groups, size = values[0].values.shape[1:3]
  shape = (batch, groups, heads // groups, length, size)
  parts = []
  for query, key in zip(queries, keys, strict=True):
    own = key.values.shape[1]  # 1 where the groups share it
    rows = (query * scale).reshape(batch, length, own, heads // own, -1)
    part = dot('btkgn,bksn->bkgts', rows, key.values.astype(dtype))
    part = part if key.scale is None else part * key.scale[:, :, None, None, :]
    parts.append(part.reshape(shape))
  slots = jnp.arange(size, dtype=jnp.int32)[None, None, None, None]
  visible = slots <= positions[:, None, None, :, None]
  if starts is not None:
    visible &= slots >= starts[:, None, None, :, None]
  scores = jnp.where(visible, sum(parts), -jnp.inf)
  # Divided by their total only after they met the values: one pass over the slots less.
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  fits = jnp.max(positions, axis=1) < size
  total = jnp.where(fits[:, None, None, None, None], total, jnp.nan)
  outs = []
  for value in values:
    share = weights if value.scale is None else weights * value.scale[:, :, None, None, :]
    # The output keeps the operands' order; any other makes XLA's CPU backend transpose the values.
    outs.append(dot('bkgts,bksv->bkgtv', share.astype(dtype), value.values.astype(dtype)))
  out = jnp.concatenate(outs, axis=-1) / total
  return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, -1).astype(dtype)


def append(
  into: Shaped[Array, ' B *slots'],
  new: Shaped[Array, ' B *new'],
  starts: Int[Array, ' B'],
  axis: int,
) -> Shaped[Array, ' B *slots']:
  """`into` with each row's new slots, along `axis`, from starts[b] on.

  A row that they would run over the end of stays as it was: a scatter drops what a
  dynamic_update_slice would shift to where it fits, over older tokens. On a mesh that doesn't split
  the rows, the slots may be (mla/cache.py), and XLA would gather all of them for a scatter.
  """
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else math.prod(mesh.shape[name] for name in rule('B', mesh))
  if len(into) % devices:
    return _append_anywhere(into, new, starts, axis)

  def row(into: Array, new: Array, start: Array) -> Array:
    where = jax.lax.ScatterDimensionNumbers(
      update_window_dims=tuple(range(into.ndim)),
      inserted_window_dims=(),
      scatter_dims_to_operand_dims=(axis - 1,),
    )
    return jax.lax.scatter(
      into,
      start[None],
      new,
      where,
      indices_are_sorted=True,
      unique_indices=True,
      mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )

  return jax.vmap(row)(into, new, starts)


def _append_anywhere(into, new, starts, axis):
  """append in which each slot is written on its own, with the new token that is its, or none."""
  length, size = new.shape[axis], into.shape[axis]
  index = jnp.arange(size, dtype=jnp.int32)[None] - starts[:, None]  # [B, slots], into new
  fits = (starts >= 0) & (starts <= size - length)
  written = fits[:, None] & (index >= 0) & (index < length)
  shape = tuple(n if i in (0, axis) else 1 for i, n in enumerate(into.shape))
  chosen = jnp.take_along_axis(new, jnp.clip(index, 0, length - 1).reshape(shape), axis)
  return jnp.where(written.reshape(shape), chosen, into)


def rms_norm(
  x: Float[Array, '*tokens D'], gain: Float[Array, ' D'], epsilon: float
) -> Float[Array, '*tokens D']:
  """x / rms(x) * gain, in float32."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
  return (wide * inverse * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)
