"""The GPU's backend: what it makes of heads before and after the fused kernel.

cuDNN runs on no CPU, so JAX's own operations stand in for the kernel, through the same public
function; tests/aot has the kernel itself compiled, and on a GPU these tests run it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla import backends
from mla.backends import blockwise, cudnn

GPU = jax.default_backend() == 'gpu'


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
  """On a GPU the kernel itself."""
  attention = jax.nn.dot_product_attention

  def stand_in(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    q, k, v = args
    assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] % 8 == 0
    return attention(*args, **kwargs, implementation='xla')

  if not GPU:
    monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)


def parts_of(heads: int, groups: int, nope: int, rope: int, value: int, length: int):
  """Queries and keys in two parts, the second of one head for all, and values, in bfloat16."""
  draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  keys = iter(jax.random.split(jax.random.key(0), 6))
  queries = [draw(next(keys), (2, length, heads, n)) for n in (nope, rope) if n]
  shared = [(groups, nope), (1, rope)]
  cached = [draw(next(keys), (2, length, k, n)) for k, n in shared if n]
  return queries, cached, draw(next(keys), (2, length, groups, value))


@pytest.mark.parametrize(
  ('heads', 'groups', 'nope', 'rope', 'value', 'length'),
  [
    (4, 4, 16, 0, 16, 64),
    (4, 2, 16, 0, 16, 33),
    (4, 1, 16, 0, 16, 64),
    (4, 4, 16, 8, 16, 64),  # MLA: keys wider than values, a part that all heads share
    (4, 4, 12, 3, 20, 37),  # values wider, no multiple of 8, an odd length
    (12, 12, 64, 32, 64, 128),
  ],
)
def test_values_and_gradients_are_blockwises(heads, groups, nope, rope, value, length):
  queries, keys, values = parts_of(heads, groups, nope, rope, value, length)

  def of(function):
    out, pull = jax.vjp(lambda *args: function(*args, 0.2), queries, keys, values)
    assert out.shape == (2, length, heads, value) and out.dtype == jnp.bfloat16
    return out, *jax.tree.leaves(pull(jnp.ones_like(out)))

  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, keys, values))
  exact, pull = jax.vjp(lambda *args: blockwise.causal(*args, 0.2), *wide)
  expected = exact, *jax.tree.leaves(pull(jnp.ones_like(exact)))
  for one, other in zip(jax.jit(of, static_argnums=0)(cudnn.causal), expected, strict=True):
    scale = float(jnp.max(jnp.abs(other)))
    np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=0.02 * scale)


def test_what_it_cannot_do_is_told_once_and_done_by_blockwise(monkeypatch, caplog):
  monkeypatch.setattr(backends, '_platform', lambda: 'gpu')
  backends._warn.cache_clear()
  queries, keys, values = parts_of(4, 4, 16, 8, 16, 20)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, keys, values))
  for _ in range(2):
    out = backends.causal_attention(*wide, scale=0.2)
    np.testing.assert_array_equal(out, blockwise.causal(*wide, 0.2))
  (record,) = caplog.records
  assert 'cudnn' in record.message and 'float32' in record.message
  queries, keys, values = parts_of(2, 2, 128, 8, 16, 20)
  backends.causal_attention(queries, keys, values, scale=0.2)
  assert '128 dims, not 136' in caplog.records[-1].message
  queries, keys, values = parts_of(4, 4, 16, 0, 16, 20)
  starts = jnp.zeros((2, 20), jnp.int32).at[:, 9:].set(9)
  out = backends.causal_attention(queries, keys, values, scale=0.2, starts=starts)
  np.testing.assert_array_equal(out, blockwise.causal(queries, keys, values, 0.2, starts))
  assert 'data.packing' in caplog.records[-1].message
  backends._warn.cache_clear()


def test_a_gpu_takes_it_by_itself(monkeypatch):
  monkeypatch.setattr(backends, '_platform', lambda: 'gpu')
  taken = []
  monkeypatch.setattr(
    cudnn, 'causal', lambda queries, keys, values, scale, _: taken.append(scale) or queries[0]
  )
  backends.causal_attention(*parts_of(4, 4, 16, 0, 16, 20), scale=0.2)
  assert taken == [0.2]
