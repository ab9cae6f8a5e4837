"""The TPU's backend against attention as it is defined, its kernels interpreted on a CPU; tests/aot
compiles them for TPUs. And key heads fewer than the devices that share them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from test_exchanges import exchanges

from mla import backends
from mla.backends import blockwise, splash


@pytest.fixture
def on_tpu(monkeypatch):
  """As if compiled for a TPU; what is told once is told again."""
  monkeypatch.setattr(splash, 'INTERPRET', True)
  monkeypatch.setattr(backends, '_platform', lambda: 'tpu')
  backends._warn.cache_clear()
  yield
  backends._warn.cache_clear()


def draw(shape, dtype=np.float32):
  """By numpy, which compiles nothing."""
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def draw_parts(batch, length, heads, groups, nope, rope, value, dtype=np.float32):
  """Queries and keys, with a rotary part of one key head if rope is not 0; values."""
  rows = (batch, length)
  queries = [draw((*rows, heads, size), dtype) for size in (nope, rope) if size]
  keys = [draw((*rows, count, n), dtype) for count, n in ((groups, nope), (1, rope)) if n]
  return queries, keys, draw((*rows, groups, value), dtype)


def plain(queries, keys, values, scale, starts=None):
  """Parts joined, key heads repeated, all scores at once, in float32."""
  heads = queries[0].shape[2]

  def repeat(x):
    return jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2)

  q = jnp.concatenate([x.astype(jnp.float32) for x in queries], axis=-1)
  k = jnp.concatenate([repeat(x) for x in keys], axis=-1)
  scores = jnp.einsum('bthn,bshn->bhts', q, k) * scale
  seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
  if starts is not None:
    seen &= jnp.arange(q.shape[1]) >= starts[:, None, :, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum('bhts,bshv->bthv', weights, repeat(values))


def weights_for(queries, keys, values):
  return draw((*queries[0].shape[:3], values.shape[3]))


def with_gradients(attend):
  """A program: attend's values, and the gradients of their sum with weights."""

  def both(arrays, weights):
    out, pull = jax.vjp(functools.partial(attend, scale=0.3), *arrays)
    return out, *jax.tree.leaves(pull(weights))

  return jax.jit(both)


def check(got, arrays, **how):
  expected = with_gradients(functools.partial(plain, **how))(arrays, weights_for(*arrays))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize(
  ('heads', 'groups', 'nope', 'rope', 'value', 'length'),
  [
    (2, 2, 8, 0, 8, 128),  # mha, and nothing to add
    (4, 2, 8, 0, 8, 131),  # gqa, an odd length
    (3, 1, 6, 0, 10, 7),  # mqa, values wider than keys, less than a block
    (2, 2, 6, 4, 8, 140),  # mla: keys in two parts, wider than values
    (4, 2, 6, 4, 7, 530),  # several blocks; a part for all beside grouped heads
  ],
)
def test_values_and_gradients(on_tpu, heads, groups, nope, rope, value, length):
  arrays = draw_parts(1, length, heads, groups, nope, rope, value)
  check(with_gradients(backends.causal_attention)(arrays, weights_for(*arrays)), arrays)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 1, 2)])
def test_documents_of_a_row_are_kept_apart(on_tpu, shape):
  """As its segments, of several blocks, one of them of other documents only; and over a mesh."""
  arrays = draw_parts(2, 1100, 4, 2, 6, 4, 7)
  begun = [[0, 1, 600, 1090], [0, 40]]
  starts = jnp.stack([jnp.repeat(jnp.array(r), np.diff([*r, 1100])) for r in begun])
  attend = functools.partial(backends.causal_attention, starts=starts)
  with jax.set_mesh(mesh_of(shape)):
    check(with_gradients(attend)(arrays, weights_for(*arrays)), arrays, starts=starts)


def test_bfloat16_keeps_its_softmax_in_float32(on_tpu):
  # 600 equal weights: a bfloat16 sum would stick at 256.
  k, v = (jnp.full((1, 600, 1, 8), value, jnp.bfloat16) for value in (0, 1))
  out = backends.causal_attention([k], [k], v, scale=1.0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=0.01)


def test_a_mesh_gives_what_one_device_gives(on_tpu):
  """Each device runs the kernel on its rows and heads, fewer key heads than devices included."""
  arrays = draw_parts(2, 20, 4, 1, 6, 4, 8)
  with jax.set_mesh(mesh_of((2, 1, 2))):
    check(with_gradients(backends.causal_attention)(arrays, weights_for(*arrays)), arrays)


@pytest.mark.parametrize(
  ('width', 'dtype', 'said'),
  [(8, jnp.float16, 'not in float16'), (300, jnp.float32, 'at most 2048 bytes, not 2400')],
)
def test_what_it_cannot_do_is_told_once_and_done_by_blockwise(on_tpu, caplog, width, dtype, said):
  arrays = jax.tree.map(jnp.asarray, draw_parts(1, 9, 2, 2, width, 0, width, dtype))
  for _ in range(2):
    out = backends.causal_attention(*arrays, scale=0.1)
    np.testing.assert_array_equal(out, blockwise.causal(*arrays, 0.1))
  (record,) = caplog.records
  assert 'splash' in record.message and said in record.message and '\n' not in record.message


@pytest.mark.parametrize('length', [1, 127, 128, 256, 513, 1100, 1408, 2048, 8191, 8192])
def test_blocks_cover_the_length_and_are_not_small(length):
  block, fill = splash._blocks(length)
  assert (length + fill) % block == 0 and block % splash.LANES == 0 and block <= splash.BLOCK
  assert block >= min(256, -(-length // splash.LANES) * splash.LANES)
  assert fill < splash.LANES * (length + fill) // block


@pytest.mark.parametrize(('shape', 'groups'), [((1, 1, 8), 2), ((2, 2, 2), 1)])
def test_fewer_key_heads_than_devices_are_added_up_outside_of_loops(shape, groups):
  """In blockwise, whose loops XLA splits by itself: values, gradients, and what is exchanged."""
  mesh = mesh_of(shape)
  arrays = draw_parts(4, 70, 8, groups, 6, 0, 10)
  heads = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'tensor'))
  rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  placed = jax.device_put((arrays, weights_for(*arrays)), ((heads, rows, rows), heads))
  program = with_gradients(functools.partial(backends.causal_attention, impl='blockwise'))
  with jax.set_mesh(mesh):
    compiled = program.lower(*placed).compile()
  check(compiled(*placed), arrays)
  found = exchanges(compiled.as_text())
  assert found and all(outside for outside, _, _ in found)
