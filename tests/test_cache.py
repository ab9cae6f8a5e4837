import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla import cache as cache_lib
from mla.attention import append

SHAPES = {'k': (3, 5), 'latent': (7,)}


@pytest.mark.parametrize('dtype', cache_lib.DTYPES)
def test_what_is_written_is_read_where_it_belongs(dtype):
  rng = np.random.default_rng(0)
  entries = {
    'k': jnp.asarray(rng.normal(size=(2, 4, 3, 5)), jnp.float32),
    'latent': jnp.asarray(rng.normal(size=(2, 4, 7)), jnp.float32),
  }
  cache = cache_lib.allocate([SHAPES], batch=2, slots=9, dtype=dtype)
  layer = append(cache.layers[0], entries, jnp.array([0, 5]))
  bound = {'float32': 0, 'bfloat16': 0.02, 'int8': 0.02}[dtype]
  for name, new in entries.items():
    stored = layer[name]
    values = np.asarray(stored.values, np.float32)
    if stored.scale is not None:
      values *= np.asarray(stored.scale)[..., None]
    values = np.moveaxis(values, -2, 1)  # [B, S, ...]
    np.testing.assert_allclose(values[0, :4], new[0], atol=bound)
    np.testing.assert_allclose(values[1, 5:], new[1], atol=bound)
    assert np.all(values[0, 4:] == 0)
    assert np.all(values[1, :5] == 0)


def test_int8_is_off_by_at_most_half_a_step_and_survives_zeros():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 16)) * 10.0, jnp.float32)
  values, scale = cache_lib.quantise(x)
  assert values.dtype == jnp.int8
  assert float(jnp.max(jnp.abs(values * scale[:, None] - x) / scale[:, None])) <= 0.5 + 1e-4
  values, scale = cache_lib.quantise(jnp.zeros((2, 4)))
  assert np.all(np.asarray(values * scale[:, None]) == 0)


def test_an_unknown_dtype_is_refused():
  with pytest.raises(ValueError, match='float32, bfloat16, int8'):
    cache_lib.allocate([SHAPES], batch=1, slots=1, dtype='float16')


def test_a_donated_cache_is_written_in_place():
  cache = cache_lib.allocate([SHAPES] * 2, batch=2, slots=64, dtype='float32')
  before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)}
  new = {'k': jnp.ones((2, 1, 3, 5)), 'latent': jnp.ones((2, 1, 7))}

  @jax.jit
  def step(cache):
    layers = tuple(append(layer, new, cache.lengths) for layer in cache.layers)
    return cache_lib.Cache(layers, cache.lengths + 1)

  after = jax.jit(step, donate_argnums=0)(cache)
  assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.layers)} == before
