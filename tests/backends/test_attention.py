"""Softmax attention against a plain reference, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from mla import backends
from mla.backends import blockwise, cpu
from mla.cache import Stored, quantise

KEY = jax.random.key(0)


@pytest.fixture(params=['cpu', 'blockwise'])
def impl(request) -> str:
  """Each backend that a CPU has."""
  if request.param == 'cpu' and cpu.missing():
    pytest.skip(cpu.missing())
  return request.param


def plain(q, k, v, scale, positions=None, starts=0):
  """All heads repeated, all scores at once, softmax as it is defined."""
  repeats = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
  scores = jnp.einsum('bthn,bshn->bhts', q, k) * scale
  positions = jnp.arange(q.shape[1])[None] if positions is None else positions
  visible = jnp.arange(k.shape[1]) <= positions[:, None, :, None]
  visible &= jnp.arange(k.shape[1]) >= jnp.broadcast_to(starts, q.shape[:2])[:, None, :, None]
  weights = jnp.exp(scores) * visible
  return jnp.einsum('bhts,bshv->bthv', weights / weights.sum(-1, keepdims=True), v)


def inputs(length, heads, groups, n=10, v=6, slots=None):
  keys = jax.random.split(KEY, 4)
  slots = slots or length
  return (
    jax.random.normal(keys[0], (2, length, heads, n)),
    jax.random.normal(keys[1], (2, slots, groups, n)),
    jax.random.normal(keys[2], (2, slots, groups, v)),
    jax.random.normal(keys[3], (2, length, heads, v)),
  )


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('length', [1, 15, 17, 64, 131])
def test_values_and_gradients(impl, groups, length):
  check_gradients(
    inputs(length, 6, groups),
    lambda q, k, v: backends.causal_attention([q], [k], v, scale=0.3, impl=impl),
  )


@pytest.mark.parametrize('groups', [2, 6])
def test_a_part_of_the_keys_that_all_heads_share(impl, groups):
  q, k, v, weights = inputs(70, 6, groups)

  def ours(q, k, v):
    shared = k[:, :, :1, 6:]
    return backends.causal_attention(
      [q[..., :6], q[..., 6:]], [k[..., :6], shared], v, scale=0.3, impl=impl
    )

  def whole(q, k, v):
    shared = jnp.broadcast_to(k[:, :, :1, 6:], (*k.shape[:3], 4))
    return plain(q, jnp.concatenate([k[..., :6], shared], axis=-1), v, 0.3)

  check_gradients((q, k, v, weights), ours, whole)


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize(('length', 'block'), [(1, 8), (7, 8), (16, 8), (21, 8), (21, 0)])
def test_blockwise_values_and_gradients(groups, length, block):
  check_gradients(
    inputs(length, 6, groups), lambda q, k, v: blockwise.causal([q], [k], v, 0.3, block=block)
  )


# Where the documents of two rows begin: at a block's edge, within, side by side; and none but the
# row itself, or one that began before it.
BEGUN = [[0, 7, 8, 64, 100], [0, 129]]


def starts_of(length):
  begun = [[at for at in row if at < length] for row in BEGUN]
  return jnp.stack([jnp.repeat(jnp.array(r), np.diff([*r, length])) for r in begun])


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('length', [1, 15, 64, 131, 200])
def test_documents_of_a_row_are_kept_apart(impl, groups, length):
  starts = starts_of(length)
  check_gradients(
    inputs(length, 6, groups),
    lambda q, k, v: backends.causal_attention([q], [k], v, scale=0.3, starts=starts, impl=impl),
    lambda q, k, v: plain(q, k, v, 0.3, None, starts),
  )


def test_documents_are_kept_apart_on_a_mesh(impl):
  starts = starts_of(131)
  with jax.set_mesh(mesh_of((2, 1, 2))):
    check_gradients(
      inputs(131, 4, 2),
      lambda q, k, v: backends.causal_attention([q], [k], v, scale=0.3, starts=starts, impl=impl),
      lambda q, k, v: plain(q, k, v, 0.3, None, starts),
    )


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_nothing_of_another_document_is_looked_at(impl, bad):
  q, k, v, _ = inputs(200, 2, 2)
  starts = starts_of(200)
  read = functools.partial(backends.causal_attention, scale=0.3, starts=starts, impl=impl)
  out = read([q], [k.at[0, 40, 1].set(bad)], v)
  np.testing.assert_array_equal(out[0, 64:], read([q], [k], v)[0, 64:])
  assert not np.all(np.isfinite(out[0, 40:64]))


def check_gradients(arrays, ours, reference=lambda q, k, v: plain(q, k, v, 0.3)):
  """Values, and the gradients of a weighted sum of them, against the reference's."""
  *args, weights = arrays

  def all_of(function):
    out, pull = jax.vjp(function, *args)
    return out, *pull(weights)

  got, expected = (jax.jit(all_of, static_argnums=0)(f) for f in (ours, reference))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=5e-5)


def test_large_scores_do_not_overflow(impl):
  q, k, v, _ = inputs(16, 2, 2)
  out = backends.causal_attention([q * 100], [k * 100], v, scale=1.0, impl=impl)
  assert np.all(np.isfinite(out))


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_hidden(impl, bad):
  # Or training would go on with a loss that looks well.
  q, k, v, _ = inputs(20, 2, 2)
  out = backends.causal_attention([q.at[0, 7, 1, 0].set(bad)], [k], v, scale=1.0, impl=impl)
  assert np.all(np.isnan(out[0, 7, 1]))
  assert np.all(np.isfinite(out[1]))


def test_bfloat16_keeps_its_softmax_in_float32(impl):
  # 600 equal weights: a bfloat16 sum would stick at 256.
  k = jnp.zeros((1, 600, 1, 8), jnp.bfloat16)
  v = jnp.ones((1, 600, 1, 8), jnp.bfloat16)
  out = backends.causal_attention([k], [k], v, scale=1.0, impl=impl)
  np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=0.01)


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_cached_against_plain(impl, groups):
  q, k, v, _ = inputs(3, 6, groups, slots=20)
  positions = jnp.array([[4, 5, 6], [15, 16, 17]])
  stored = [Stored(x.swapaxes(1, 2), None) for x in (k, v)]
  got = backends.cached_attention([q], stored[:1], stored[1:], positions, scale=0.3, impl=impl)
  np.testing.assert_allclose(got, plain(q, k, v, 0.3, positions), atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize(('length', 'heads'), [(1, 6), (3, 6), (70, 2)])
def test_documents_are_kept_apart_in_a_cache(impl, dtype, length, heads):
  """Queries few and many, of one document and of several; splits and blocks wholly unseen."""
  slots = 2300
  q, k, v, _ = inputs(length, heads, 2, n=16, v=16, slots=slots)
  positions = jnp.array([[2200], [90]]) + jnp.arange(length)[None]
  starts = jnp.array([[2190], [5]]) + jnp.zeros_like(positions)
  starts = starts.at[0, length // 2 :].set(2200 + length // 2)
  wide = (k, v)
  if dtype == 'int8':
    stored = [Stored(*quantise(x.swapaxes(1, 2))) for x in wide]
    wide = [(s.values * s.scale[..., None]).swapaxes(1, 2) for s in stored]
  else:
    stored = [Stored(x.swapaxes(1, 2).astype(dtype), None) for x in wide]
    wide = [x.astype(dtype).astype(jnp.float32) for x in wide]
  got = backends.cached_attention(
    [q], stored[:1], stored[1:], positions, scale=0.3, starts=starts, impl=impl
  )
  np.testing.assert_allclose(got, plain(q, *wide, 0.3, positions, starts), atol=2e-5)


def test_cached_scores_add_up_over_parts(impl):
  q, k, v, _ = inputs(3, 6, 1, slots=20)
  positions = jnp.array([[4, 5, 6], [15, 16, 17]])
  whole = Stored(k.swapaxes(1, 2), None)
  parts = [Stored(whole.values[..., :7], None), Stored(whole.values[..., 7:], None)]
  values = Stored(v.swapaxes(1, 2), None)
  got = backends.cached_attention(
    [q[..., :7], q[..., 7:]], parts, [values], positions, scale=0.3, impl=impl
  )
  expected = backends.cached_attention([q], [whole], [values], positions, scale=0.3, impl=impl)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_cached_int8_is_attention_to_the_dequantised_cache(impl):
  q, k, v, _ = inputs(3, 6, 2, slots=20)
  positions = jnp.array([[4, 5, 6], [15, 16, 17]])
  stored = [Stored(*quantise(x.swapaxes(1, 2))) for x in (k, v)]
  wide = [(s.values * s.scale[..., None]).swapaxes(1, 2) for s in stored]
  got = backends.cached_attention([q], stored[:1], stored[1:], positions, scale=0.3, impl=impl)
  np.testing.assert_allclose(got, plain(q, *wide, 0.3, positions), atol=1e-5)


@pytest.mark.parametrize('quantised', [False, True])
def test_cached_values_of_several_parts_come_side_by_side(impl, quantised):
  q, k, v, _ = inputs(3, 6, 2, slots=20)
  positions = jnp.array([[4, 5, 6], [15, 16, 17]])

  def store(x):
    x = x.swapaxes(1, 2)
    return Stored(*quantise(x)) if quantised else Stored(x, None)

  keys, parts = [store(k)], [store(v[..., :2]), store(v[..., 2:3]), store(v[..., 3:])]
  got = backends.cached_attention([q], keys, parts, positions, scale=0.3, impl=impl)
  expected = [
    backends.cached_attention([q], keys, [part], positions, scale=0.3, impl=impl) for part in parts
  ]
  np.testing.assert_allclose(got, np.concatenate(expected, -1), atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_latent_in_blocks_is_read_as_a_whole_one(impl, dtype):
  """Keys and values are the same blocks, with a rotary key beside them, as nested MLA has it."""
  q, _, _, _ = inputs(3, 6, 1, slots=20)
  rng = np.random.default_rng(5)
  latent, turned = (jnp.asarray(rng.normal(size=(2, 1, 20, d)), dtype) for d in (12, 4))
  queries = [jnp.asarray(rng.normal(size=(*q.shape[:3], d)), jnp.float32) for d in (12, 4)]
  positions = jnp.array([[4, 5, 6], [15, 16, 17]])
  whole, rope = Stored(latent, None), Stored(turned, None)
  expected = backends.cached_attention(
    queries, [whole, rope], [whole], positions, scale=0.3, impl=impl
  )
  blocks = [Stored(part, None) for part in jnp.split(latent, [4, 7], axis=-1)]
  parts = [*jnp.split(queries[0], [4, 7], axis=-1), queries[1]]
  got = backends.cached_attention(parts, [*blocks, rope], blocks, positions, scale=0.3, impl=impl)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_memory_of_the_gradient_is_linear_in_length(impl):
  def peak(length):
    shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    loss = jax.grad(
      lambda q, k, v: backends.causal_attention([q], [k], v, scale=1.0, impl=impl).sum(),
      argnums=(0, 1, 2),
    )
    return jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

  one, two, four, eight = (peak(1024 * factor) for factor in (1, 2, 4, 8))
  assert two < 2.2 * one
  assert four < 2.2 * two
  assert eight < 2.2 * four
