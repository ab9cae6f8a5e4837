"""Logits in chunks against optax on whole ones, and that they are nowhere whole."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import arrays_in, mesh_of, tiny_config
from flax import nnx

from mla import loss
from mla import step as step_lib
from mla.model import forward, make_model

BATCH, LENGTH, WIDTH, VOCAB = 8, 21, 16, 72  # of 21 positions the last chunk is not full
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)]


def draw(batch=BATCH, vocab=VOCAB, dtype='float32'):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (batch, LENGTH, WIDTH), dtype)
  w_out = 3 * jax.random.normal(keys[1], (WIDTH, vocab))  # losses far from uniform
  return x, w_out, jax.random.randint(keys[2], (batch, LENGTH), 0, vocab)


def plain(x, w_out, targets):
  logits = jnp.einsum('btd,dv->btv', x.astype(jnp.float32), w_out, precision='highest')
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.fixture
def small_chunks(monkeypatch):
  """Of two positions of eight rows; as many more as the mesh has devices."""
  monkeypatch.setattr(loss, 'CHUNK_BYTES', 2 * 8 * 4 * VOCAB)


def both(x, w_out, targets, tokens=None):
  """Each loss; three times the mean, and its gradients."""
  mean = jax.value_and_grad(lambda *inputs: 3 * loss.mean_nll(*inputs, targets, tokens), (0, 1))
  return loss.token_nll(x, w_out, targets, tokens), *mean(x, w_out)


def compare(x, w_out, targets, bound=1e-5):
  """Ours beside optax's, errors as shares of each array's largest element."""
  mean = jax.value_and_grad(lambda *inputs: 3 * jnp.mean(plain(*inputs, targets)), (0, 1))
  expected = plain(x, w_out, targets), *mean(x.astype(jnp.float32), w_out)
  found = jax.jit(both)(x, w_out, targets)
  for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.max(np.abs(ours.astype(jnp.float32) - theirs)) < bound * np.max(np.abs(theirs))


@pytest.mark.parametrize('shape', MESHES)
def test_values_and_gradients_are_those_of_whole_logits(shape, small_chunks, monkeypatch):
  monkeypatch.setattr(loss, 'CHUNK_BYTES', loss.CHUNK_BYTES // math.prod(shape))
  with jax.set_mesh(mesh_of(shape)):
    compare(*draw())


@pytest.mark.parametrize('chunks', [True, False])
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_columns_that_round_the_vocabulary_get_no_probability(shape, chunks, request):
  """Losses and gradients are those without them; on (1, 1, 8) a device has no others."""
  if chunks:
    request.getfixturevalue('small_chunks')
  x, w_out, targets = draw()
  tokens = 60
  targets %= tokens
  with jax.set_mesh(mesh_of(shape)):
    found = jax.jit(lambda x, w, t: both(x, w, t, tokens))(x, w_out, targets)
  mean = jax.value_and_grad(lambda *inputs: 3 * jnp.mean(plain(*inputs, targets)), (0, 1))
  nll, loss_, (d_x, d_w) = found
  expected_loss, (expected_x, expected_w) = mean(x, w_out[:, :tokens])
  np.testing.assert_allclose(nll, plain(x, w_out[:, :tokens], targets), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(loss_, expected_loss, rtol=1e-5)
  np.testing.assert_allclose(d_x, expected_x, atol=1e-5 * np.max(np.abs(expected_x)))
  np.testing.assert_allclose(d_w[:, :tokens], expected_w, atol=1e-5 * np.max(np.abs(expected_w)))
  assert not np.any(d_w[:, tokens:])


@pytest.mark.parametrize('sizes', [{'batch': 3}, {'vocab': 71}])
def test_what_does_not_divide_over_the_mesh_is_right_too(sizes, small_chunks):
  with jax.set_mesh(mesh_of((2, 2, 2))):
    compare(*draw(**sizes))


def test_bfloat16_states_lose_no_more_than_their_rounding(small_chunks):
  compare(*draw(dtype='bfloat16'), bound=0.03)


@pytest.mark.parametrize(
  'flag',
  [
    lambda: jax.enable_x64(True),
    lambda: jax.numpy_rank_promotion('raise'),
    lambda: jax.numpy_dtype_promotion('strict'),
  ],
)
def test_a_users_own_flags_change_nothing(flag, small_chunks):
  inputs = draw()
  expected = jax.jit(both)(*inputs)
  with flag():
    found = jax.jit(both)(*inputs)
  for now, before in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert now.dtype == before.dtype
    np.testing.assert_allclose(now, before, rtol=1e-6, atol=1e-7)


@functools.cache
def tiny_model():
  """(graphdef, params)"""
  return nnx.split(make_model(tiny_config('mla', num_layers=1), VOCAB))


def gradients(params, tokens):
  """train_step's loss and gradients."""
  graphdef = tiny_model()[0]
  return jax.value_and_grad(lambda p: step_lib.mean_nll(nnx.merge(graphdef, p), tokens))(params)


def windows() -> jax.Array:
  return jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCAB)


def largest_logits() -> int:
  """Elements of the largest array with the vocabulary among its axes that a step computes."""
  _, params = tiny_model()
  weights = {leaf.shape for leaf in jax.tree.leaves(params)}
  program = jax.make_jaxpr(lambda *inputs: gradients(*inputs))  # traced anew
  found = arrays_in(program(params, windows()).jaxpr)
  return max(x.size for x in found if VOCAB in x.shape and x.shape not in weights)


def test_no_training_step_has_whole_logits(small_chunks):
  assert largest_logits() <= loss.CHUNK_BYTES // 4
  with loss.whole():
    assert largest_logits() == BATCH * LENGTH * VOCAB  # the count does see such arrays


def test_chunks_save_memory(small_chunks):
  """As compiled: some chunk's arrays instead of the logits and their gradient."""

  def temporary() -> int:
    inputs = draw(batch=32, vocab=8 * VOCAB)
    compiled = jax.jit(lambda *inputs: both(*inputs)[1:]).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  with loss.whole():
    whole = temporary()
  assert temporary() < whole / 4


def test_a_model_on_a_mesh_learns_the_same_from_chunks(small_chunks):
  with loss.whole():
    expected = jax.jit(lambda *inputs: gradients(*inputs))(tiny_model()[1], windows())
  with jax.set_mesh(mesh_of((2, 2, 2))):
    found = jax.jit(lambda *inputs: gradients(*inputs))(tiny_model()[1], windows())
  for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_masked_evaluation_with_chunks(shape, small_chunks):
  graphdef, params = tiny_model()
  tokens, mask = windows(), jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 == 0
  logits = forward(nnx.merge(graphdef, params), tokens[:, :-1])
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  with jax.set_mesh(mesh_of(shape)):
    found = jax.jit(functools.partial(step_lib.eval_step, graphdef))(params, tokens, mask)
  assert int(found['targets']) == BATCH * LENGTH // 3
  np.testing.assert_allclose(found['nll'], np.sum(np.asarray(nll)[np.asarray(mask)]), rtol=1e-5)
