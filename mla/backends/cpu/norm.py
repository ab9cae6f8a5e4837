"""RMSNorm with its gradient by hand, for XLA's CPU backend."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
  x: Float[Array, '*tokens D'], gain: Float[Array, ' D'], epsilon: float
) -> Float[Array, '*tokens D']:
  """blockwise.rms_norm.

  To sums over x, the output's gradient and the gain XLA's CPU backend gives the gain, and each
  token's factor, repeated to x's size in memory; products with a vector need no such copies.
  """
  return _forward(x, gain, epsilon)[0]


def _forward(x, gain, epsilon):
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
  row = jnp.expand_dims(gain, range(x.ndim - 1))
  return (wide * inverse * row).astype(x.dtype), (x, gain, inverse)


def _backward(epsilon, saved, d_out):
  x, gain, inverse = saved
  wide, d_out = (a.astype(jnp.float32).reshape(-1, gain.size) for a in (x, d_out))
  inverse = inverse.reshape(-1, 1)
  along = wide * d_out
  pull = jnp.matmul(along, gain[:, None], precision='highest') * inverse**2 / gain.size
  d_x = inverse * (d_out * gain[None] - wide * pull)
  d_gain = jnp.matmul(inverse[:, 0], along, precision='highest')
  return d_x.reshape(x.shape).astype(x.dtype), d_gain


rms_norm.defvjp(_forward, _backward)
