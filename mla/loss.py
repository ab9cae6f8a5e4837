"""Cross-entropy of each next token, from the decoder's last states.

Logits [B, T, vocab] in float32 are the largest array of a step: 2 GB for 16 windows of 1,024 tokens
and a vocabulary of 32,000, and several times that with their gradient. Where they are large they
are made for a chunk of positions at a time, and none are kept: a mean's gradient is known, but for
a factor, while the chunk's logits are there, and is taken then. Rows and vocabulary stay on the
devices that have them. Each device adds up its own gradient of w_out in float32; devices exchange
that sum, once, and where the vocabulary is split three numbers a token and its state's gradient.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mla.sharding import constrain, spread, sum_over

# Of a chunk's float32 logits on one device. A chunk reads w_out twice and its gradient once, and
# writes that: below a thousand tokens (of 32,000 logits) this takes longer than the products do on
# a TPU v5e or an H100.
CHUNK_BYTES = 2**27

_whole = False


@contextlib.contextmanager
def whole() -> Iterator[None]:
  """While it lasts, logits are traced whole, so that XLA, which counts a loop's body once, sees all
  their FLOPs."""
  global _whole
  _whole = True
  try:
    yield
  finally:
    _whole = False


def only_tokens(logits: Float[Array, '*batch vocab'], tokens: int) -> Float[Array, '*batch vocab']:
  """Logits whose first `tokens` are of tokens; others, there to round the size, become -inf."""
  size = logits.shape[-1]
  if size == tokens:
    return logits
  real = jnp.arange(size, dtype=jnp.int32) < tokens
  return jnp.where(jnp.expand_dims(real, range(logits.ndim - 1)), logits, -jnp.inf)


def token_nll(
  x: Float[Array, 'B T D'],
  w_out: Float[Array, 'D vocab'],
  targets: Int[Array, 'B T'],
  tokens: int | None = None,
) -> Float[Array, 'B T']:
  """Each target's negative log-likelihood in nats, float32, of states x in the compute dtype.

  Of w_out's columns the first `tokens` are of tokens, all if not given; the others have probability
  0. Not for gradients where there is more than a chunk: mean_nll is.
  """
  tokens = w_out.shape[1] if tokens is None else tokens
  if _fits(x, w_out):
    logits = (x.reshape(-1, x.shape[-1]) @ w_out.astype(x.dtype)).reshape(*targets.shape, -1)
    logits = only_tokens(logits.astype(jnp.float32), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return _in_chunks(tokens, x, w_out, targets, gradients=False)[0]


def mean_nll(
  x: Float[Array, 'B T D'],
  w_out: Float[Array, 'D vocab'],
  targets: Int[Array, 'B T'],
  tokens: int | None = None,
) -> Float[Array, '']:
  """The mean of token_nll over all targets, to be differentiated."""
  tokens = w_out.shape[1] if tokens is None else tokens
  if _fits(x, w_out):
    return jnp.mean(token_nll(x, w_out, targets, tokens))
  return _mean_in_chunks(tokens, x, w_out, targets)


def mean_scored_nll(
  x: Float[Array, 'B T D'],
  w_out: Float[Array, 'D vocab'],
  targets: Int[Array, 'B T'],
  tokens: int | None = None,
) -> Float[Array, '']:
  """mean_nll over the targets that are not -1."""
  tokens = w_out.shape[1] if tokens is None else tokens
  scored = targets >= 0
  if _fits(x, w_out):
    nll = token_nll(x, w_out, jnp.where(scored, targets, 0), tokens)
    return jnp.sum(nll, where=scored) / jnp.sum(scored)
  share = targets.size / jnp.sum(scored)
  return share * _mean_in_chunks(tokens, x, w_out, targets)  # where -1 has no loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_in_chunks(tokens, x, w_out, targets):
  return jnp.mean(token_nll(x, w_out, targets, tokens))


def _forward(tokens, x, w_out, targets):
  nll, d_x, d_w = _in_chunks(tokens, x, w_out, targets, gradients=True)
  return jnp.mean(nll), (d_x, d_w)


def _backward(tokens, saved, d_mean):
  d_x, d_w = saved
  share = d_mean / math.prod(d_x.shape[:2])
  return (d_x.astype(jnp.float32) * share).astype(d_x.dtype), d_w * share, None


_mean_in_chunks.defvjp(_forward, _backward)


def _fits(x: Array, w_out: Array) -> bool:
  """Whether all positions are one chunk."""
  return _whole or _chunk_length(x, w_out, _axes(x, w_out)) >= x.shape[1]


class _Axes(NamedTuple):
  """Those of the mesh along which things are split."""

  rows: tuple[str, ...]
  vocabulary: tuple[str, ...]
  width: tuple[str, ...]  # of w_out's gradient, which is left so where it is summed over rows


def _axes(x: Array, w_out: Array) -> _Axes:
  rows, width = spread('B', x.shape[0]), spread('D', w_out.shape[0])
  return _Axes(rows, spread('vocab', w_out.shape[1]), width if set(width) <= set(rows) else ())


def _chunk_length(x: Array, w_out: Array, axes: _Axes) -> int:
  """Positions a chunk: a power of two, which most lengths are multiples of."""
  shape = jax.sharding.get_abstract_mesh().shape
  devices = math.prod(shape[axis] for axis in axes.rows + axes.vocabulary)
  position = 4 * x.shape[0] * w_out.shape[1] // devices  # bytes
  return 1 << max(1, CHUNK_BYTES // position).bit_length() - 1


def _in_chunks(
  tokens: int, x: Array, w_out: Array, targets: Array, *, gradients: bool
) -> tuple[Array, ...]:
  """Losses [B,T]; with `gradients` those of their sum too: x's in its dtype, w_out's in float32."""
  axes = _axes(x, w_out)
  length = min(_chunk_length(x, w_out, axes), x.shape[1])
  local = functools.partial(_on_a_device, axes, length, gradients, tokens)
  # Still split when it is cast, or it would be gathered in float32.
  w = constrain(constrain(w_out.astype(x.dtype), 'D', 'vocab'), 'D_whole', 'vocab')
  if not axes.rows + axes.vocabulary:
    return local(x, w, targets)
  rows, columns = PartitionSpec(axes.rows or None), axes.vocabulary or None
  results = (rows, rows, PartitionSpec(axes.width or None, columns))
  return jax.shard_map(
    local,
    in_specs=(rows, PartitionSpec(None, columns), rows),
    out_specs=results if gradients else results[:1],
    check_vma=False,
  )(x, w, targets)


def _on_a_device(
  axes: _Axes, length: int, gradients: bool, real: int, x: Array, w: Array, targets: Array
) -> tuple[Array, ...]:
  """_in_chunks on a device's rows and its part of the vocabulary, `length` positions a chunk."""
  (batch, whole, width), vocabulary = x.shape, w.shape[1]
  parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes.vocabulary)
  fill = -whole % length
  x = jnp.pad(x, ((0, 0), (0, fill), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, fill)), constant_values=-1)
  tokens = jnp.arange(vocabulary, dtype=jnp.int32)[None]
  if axes.vocabulary:
    tokens += jax.lax.axis_index(axes.vocabulary).astype(jnp.int32) * vocabulary

  def chunk(d_w, this):
    x, target = (array.reshape(batch * length, -1) for array in this)
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    if real < vocabulary * parts:  # the others, there to round the size, get no probability
      logits = jnp.where(tokens < real, logits, -jnp.inf)
    top = jax.lax.pmax(jnp.max(logits, axis=1), axes.vocabulary)[:, None]
    hit = tokens == target
    total = jnp.sum(jnp.exp(logits - top), axis=1)
    right = jnp.sum(logits, axis=1, where=hit)
    total, right = jax.lax.psum((total, right), axes.vocabulary)
    log_total, inside = jnp.log(total)[:, None] + top, target >= 0
    nll = jnp.where(inside, log_total - right[:, None], 0.0).reshape(batch, length)
    if not gradients:
      return d_w, (nll,)
    d_logits = jnp.where(inside, jnp.exp(logits - log_total) - hit.astype(jnp.float32), 0.0)
    d_logits = d_logits.astype(x.dtype)
    d_w += jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
    return d_w, (nll, (d_logits @ w.T).reshape(batch, length, width))

  chunks = [a.reshape(batch, -1, length, *a.shape[2:]).swapaxes(0, 1) for a in (x, targets)]
  d_w, found = jax.lax.scan(chunk, jnp.zeros(w.shape if gradients else (), jnp.float32), chunks)
  found = [a.swapaxes(0, 1).reshape(batch, -1, *a.shape[3:])[:, :whole] for a in found]
  if not gradients:
    return tuple(found)
  nll, d_x = found
  d_x = jax.lax.psum(d_x, axes.vocabulary)
  return nll, d_x, sum_over(d_w, axes.rows, axes.width, axis=0)
