"""RMSNorm against the paper's formula in numpy, and its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla.layers import RMSNorm


def reference(x, gain):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain


@pytest.mark.parametrize('shape', [(5, 12), (2, 3, 8), (1, 1)])
def test_the_norm_and_its_gradient_are_the_papers(shape):
  rng = np.random.default_rng(0)
  x, towards = rng.normal(size=(2, *shape))
  gain = rng.normal(size=shape[-1]) + 1
  graphdef = nnx.graphdef(RMSNorm(D=shape[-1]))

  def through(x, gain):
    return nnx.merge(graphdef, nnx.State({'gain': nnx.Param(gain)}))(x)

  out, pull = jax.vjp(through, jnp.float32(x), jnp.float32(gain))
  np.testing.assert_allclose(out, reference(x, gain), rtol=1e-5, atol=1e-5)
  d_x, d_gain = pull(jnp.float32(towards))
  for at, gradient in ((x, d_x), (gain, d_gain)):
    expected = np.empty(at.shape)
    for index in np.ndindex(at.shape):  # central differences, in float64
      ends = []
      for step in (1e-6, -1e-6):
        kept, at[index] = at[index], at[index] + step
        ends.append(np.sum(reference(x, gain) * towards))
        at[index] = kept
      expected[index] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_normed_in_float32():
  x = jnp.float32(np.random.default_rng(0).normal(size=(4, 256))).astype(jnp.bfloat16)
  norm = RMSNorm(D=256)
  out, pull = jax.vjp(norm, x)
  exact, exact_pull = jax.vjp(norm, x.astype(jnp.float32))
  assert out.dtype == pull(out)[0].dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
  weights = jnp.linspace(-1, 1, 256, dtype=jnp.bfloat16) * jnp.ones_like(x)
  expected = exact_pull(weights.astype(jnp.float32))[0].astype(jnp.bfloat16)
  np.testing.assert_array_equal(pull(weights)[0], expected)
