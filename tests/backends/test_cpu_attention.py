"""What is the C++ part's own: reading a cache in pieces, writing to it, and doing without it."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla import cache as cache_lib
from mla.backends import cached_attention, cpu
from mla.cache import Stored

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason='no C++ compiler')


def softmax_over(stored_keys, values, queries, positions, scale):
  """Attention in float64 numpy, one query at a time."""
  batch, length, heads, _ = queries.shape
  group = heads // values.shape[1]
  out = np.zeros((batch, length, heads, values.shape[-1]))
  for b, t, h in np.ndindex(batch, length, heads):
    seen = positions[b, t] + 1
    scores = stored_keys[b, h // group, :seen] @ queries[b, t, h] * scale
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ values[b, h // group, :seen] / weights.sum()
  return out


def store(array, dtype) -> Stored:
  if dtype == 'int8':
    return Stored(*cache_lib.quantise(jnp.asarray(array)))
  return Stored(jnp.asarray(array, dtype), None)


def read(stored: Stored) -> np.ndarray:
  values = np.asarray(stored.values.astype(jnp.float32), np.float64)
  return values if stored.scale is None else values * np.asarray(stored.scale)[..., None]


@pytest.mark.parametrize('dtype', cache_lib.DTYPES)
@pytest.mark.parametrize(
  ('groups', 'dims', 'length'),
  [(1, 24, 3), (2, 32, 1), (4, 7, 2), (4, 32, 1), (4, 7, 1), (4, 80, 1), (1, 32, 2)],
)
def test_a_long_cache_is_read_whole_and_no_further(dtype, groups, dims, length):
  slots, batch, heads = 4200, 3, 4  # three splits, the last of them with a broken block
  rng = np.random.default_rng(0)
  # Queries at the first slot, on both sides of a split's edge, and at the end.
  last = np.array([length - 1, 2048 + (length - 1) // 2, slots - 1])
  positions = last[:, None] + np.arange(length) - (length - 1)
  queries = rng.standard_normal((batch, length, heads, dims)).astype(np.float32)
  wide = [rng.standard_normal((batch, groups, slots, dims)).astype(np.float32) for _ in range(2)]
  stored = [store(x, dtype) for x in wide]
  expected = softmax_over(*map(read, stored), queries, positions, 0.3)

  def attend(stored):
    return cached_attention(
      [jnp.asarray(queries)], [stored[0]], stored[1:], jnp.asarray(positions, jnp.int32), scale=0.3
    )

  np.testing.assert_allclose(jax.jit(attend)(stored), expected, atol=2e-5)

  # What lies beyond a row's last token is not looked at: not even a NaN there matters.
  if dtype != 'int8':
    beyond = np.arange(slots) > last[:, None]
    spoilt = [
      Stored(jnp.where(beyond[:, None, :, None], jnp.nan, s.values).astype(dtype), None)
      for s in stored
    ]
    np.testing.assert_array_equal(jax.jit(attend)(spoilt), jax.jit(attend)(stored))


@pytest.mark.parametrize('dtype', cache_lib.DTYPES)
@pytest.mark.parametrize('heads', [1, 4])
def test_a_key_in_two_parts_of_which_one_is_the_value(dtype, heads):
  """MLA's latent and shared rotary key, for one query and for several."""
  rng = np.random.default_rng(1)
  latent, rope = (store(rng.standard_normal((2, 1, 100, n)), dtype) for n in (32, 16))
  queries = [rng.standard_normal((2, 1, heads, n)).astype(np.float32) for n in (32, 16)]
  positions = np.array([[99], [70]])
  out = cached_attention(
    [jnp.asarray(q) for q in queries],
    [latent, rope],
    [latent],
    jnp.asarray(positions, jnp.int32),
    scale=0.3,
  )
  keys = np.concatenate([read(latent), read(rope)], -1)
  joined = np.concatenate(queries, -1)
  expected = softmax_over(keys, read(latent), joined, positions, 0.3)
  np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_an_earlier_call_left_in_memory_is_not_read(dtype):
  def attend(queries, dims):  # more tasks than threads, so that each thread has some
    stored = Stored(jnp.ones((8, 4, 64, dims), dtype), None)
    positions = jnp.full((8, 1), 63, jnp.int32)
    return cached_attention([queries], [stored], [stored], positions, scale=1.0)

  assert np.isnan(attend(jnp.full((8, 1, 4, 16), jnp.nan), 16)).all()
  np.testing.assert_allclose(attend(jnp.ones((8, 1, 4, 7)), 7), 1, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize(('shape', 'axis'), [((3, 2, 9, 5), 2), ((3, 9, 5), 1), ((3, 2, 9), 2)])
def test_append_writes_its_slots_and_no_others(dtype, shape, axis):
  rng = np.random.default_rng(0)
  into = rng.integers(-100, 100, shape)
  new = np.take(rng.integers(-100, 100, shape), range(2), axis=axis)
  starts = [0, 7, 3]
  expected = into.copy()
  for row, start in enumerate(starts):
    written = np.moveaxis(new[row], axis - 1, 0)
    np.moveaxis(expected[row], axis - 1, 0)[start : start + 2] = written
  arrays = jnp.asarray(into, dtype), jnp.asarray(new, dtype), jnp.asarray(starts, jnp.int32)
  got = jax.jit(lambda *args: cpu.append(*args, axis))(*arrays)
  np.testing.assert_array_equal(np.asarray(got, np.float32), expected)


def test_a_donated_cache_is_written_in_place():
  shape = (2, 64, 1000)
  step = jax.jit(lambda into, new: cpu.append(into, new, jnp.array([1, 2]), 1), donate_argnums=0)
  array = jnp.zeros(shape)
  compiled = step.lower(array, jnp.ones((2, 1, 1000))).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < array.nbytes / 10


@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false'])
def test_without_a_compiler_it_says_so_and_does_without(compiler, tmp_path):
  code = """
import jax, jax.numpy as jnp
from mla import backends, cli
cli.log_plainly()
backends.prepare(4, cores=2)
x = jnp.ones((4, 8, 2, 4))
print(jax.device_count(), float(backends.causal_attention([x], [x], x, scale=1.0).sum()))
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={'CXX': compiler, 'HOME': str(tmp_path), 'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ['2', '256.0']
  (line,) = [line for line in done.stderr.splitlines() if 'warning' in line]
  assert 'install g++' in line
