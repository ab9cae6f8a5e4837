"""Causal attention in blocks, as XLA operations: what runs wherever native/ does not."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Tokens a block. Small blocks waste less of the diagonal's masked half and stay in a core's cache,
# large ones make fewer and better matmuls. Measured on CPU: docs/log.md.
SHORT_BLOCK, LONG_BLOCK, SHORT = 64, 256, 512

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal(
  q: Float[Array, 'B T H n'],
  k: Float[Array, 'B T K n'],
  v: Float[Array, 'B T K V'],
  *,
  scale: float,
  block: int = 0,
) -> Float[Array, 'B T H V']:
  """kernels.causal_attention of whole queries and keys.

  A block of queries visits the blocks of keys up to its own and no others, with a running softmax;
  the backward pass recomputes the probabilities from the saved log-sum-exp (FlashAttention, Dao et
  al. 2022, arXiv 2205.14135). So memory is linear in T, gradients included. block=0 chooses.
  """
  batch, length, heads, _ = q.shape
  groups = k.shape[2]
  block = min(block or (SHORT_BLOCK if length <= SHORT else LONG_BLOCK), length)
  fill = ((0, 0), (0, -length % block), (0, 0), (0, 0))  # no real query sees the padding's keys
  q, k, v = (jnp.pad(x, fill) for x in (q * scale, k, v))
  grouped = q.reshape(*q.shape[:2], groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
  out = _blockwise(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), block)
  out = out.transpose(0, 3, 1, 2, 4)[:, :length]
  return out.reshape(batch, length, heads, -1)


def _cut(x: Array, index: Array, block: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=-2)


def _scores(
  q: Float[Array, 'B K G t n'], k: Float[Array, 'B K s n'], row: Array, column: Array
) -> Float[Array, 'B K G t s']:
  """Masked float32 scores of one block of queries against one of keys."""
  block = jnp.arange(k.shape[2])
  visible = column * len(block) + block <= row * len(block) + block[:, None]
  return jnp.where(visible, dot('bkgtn,bksn->bkgts', q, k), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise(
  q: Float[Array, 'B K G T n'], k: Float[Array, 'B K T n'], v: Float[Array, 'B K T V'], block: int
) -> Float[Array, 'B K G T V']:
  return _blockwise_forward(q, k, v, block)[0]


def _blockwise_forward(q, k, v, block):
  def attend_row(_, row):
    queries = _cut(q, row, block)

    def attend_block(column, carry):
      top, total, out = carry
      values = _cut(v, column, block)
      scores = _scores(queries, _cut(k, column, block), row, column)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
      total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
      out = out * shrink + dot('bkgts,bksv->bkgtv', weights.astype(v.dtype), values)
      return new_top, total, out

    zeros = jnp.zeros((*queries.shape[:-1], 1))
    start = (zeros - jnp.inf, zeros, jnp.zeros((*queries.shape[:-1], v.shape[-1])))
    top, total, out = jax.lax.fori_loop(0, row + 1, attend_block, start)
    return None, ((out / total).astype(v.dtype), top + jnp.log(total))

  _, rows = jax.lax.scan(attend_row, None, jnp.arange(q.shape[3] // block))
  out, log_sum = map(_join_rows, rows)
  return out, (q, k, v, out, log_sum)


def _blockwise_backward(block, saved, d_out):
  q, k, v, out, log_sum = saved
  # d_scores = weights * (d_weights - sum_s weights * d_weights), and that sum is <out, d_out>.
  mean = dot('bkgtv,bkgtv->bkgt', out, d_out)[..., None]

  def row_gradients(carry, row):
    queries, d_rows, log_sums, means = (_cut(x, row, block) for x in (q, d_out, log_sum, mean))

    def block_gradients(column, carry):
      d_q, d_k, d_v = carry
      keys, values = _cut(k, column, block), _cut(v, column, block)
      weights = jnp.exp(_scores(queries, keys, row, column) - log_sums)
      d_weights = dot('bkgtv,bksv->bkgts', d_rows, values)
      d_scores = (weights * (d_weights - means)).astype(q.dtype)
      d_q += dot('bkgts,bksn->bkgtn', d_scores, keys)
      d_k = _add(d_k, dot('bkgts,bkgtn->bksn', d_scores, queries), column, block)
      d_v = _add(d_v, dot('bkgts,bkgtv->bksv', weights.astype(v.dtype), d_rows), column, block)
      return d_q, d_k, d_v

    start = (jnp.zeros(queries.shape), *carry)
    d_q, *carry = jax.lax.fori_loop(0, row + 1, block_gradients, start)
    return tuple(carry), d_q

  start = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  (d_k, d_v), d_q = jax.lax.scan(row_gradients, start, jnp.arange(q.shape[3] // block))
  return _join_rows(d_q).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _join_rows(rows: Float[Array, 'rows B K G t n']) -> Float[Array, 'B K G T n']:
  rows = jnp.moveaxis(rows, 0, 3)
  return rows.reshape(*rows.shape[:3], -1, rows.shape[-1])


def _add(total: Array, part: Array, index: Array, block: int) -> Array:
  part += _cut(total, index, block)
  return jax.lax.dynamic_update_slice_in_dim(total, part, index * block, axis=-2)
