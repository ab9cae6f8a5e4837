"""Nested MLA: a prefix of the latent is a model, and depends on nothing beyond it."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from mla import cache as cache_lib
from mla import config as config_lib
from mla import step as step_lib
from mla.attention import nested
from mla.attention.latent import LatentAttention
from mla.cutting import cut_latent
from mla.errors import UserError
from mla.layers import project
from mla.model import allocate_cache, decode, forward, make_model, states
from mla.optimizer import make_optimizer

VOCAB = 61
WIDTHS = (4, 8, 14)
TOKENS = jax.random.randint(jax.random.key(5), (2, 21), 0, VOCAB)


@functools.cache
def whole_model(dtype: str = 'float32'):
  model = make_model(tiny_config('mla_nested', dtype=dtype), VOCAB)
  gain = model.blocks.attention.latent_norm.gain  # no longer all alike, as after training
  gain[...] = 1 + 0.3 * jnp.cos(jnp.arange(gain[...].size)).reshape(gain[...].shape)
  for key, up in enumerate((model.blocks.attention.w_uk, model.blocks.attention.w_uv)):
    up[...] = jax.random.normal(jax.random.key(key), up[...].shape) / 4
  return model


def test_training_begins_with_every_width_the_narrowest_model():
  model = make_model(tiny_config('mla_nested'), VOCAB)
  expected = forward(model, TOKENS)
  for width in WIDTHS[:-1]:
    cut = cut_latent(model, tiny_config('mla_nested'), width)[0]
    np.testing.assert_allclose(forward(cut, TOKENS), expected, atol=2e-5)
  # Keys of unit variance, as a model of that width draws them.
  up = model.blocks.attention.w_uk[...][:, : WIDTHS[0]]
  assert abs(float(jnp.std(up)) * WIDTHS[0] ** 0.5 - 1) < 0.1


@functools.cache
def cut_model(width: int, dtype: str = 'float32'):
  """The model of smaller arrays."""
  model, config = cut_latent(whole_model(dtype), tiny_config('mla_nested', dtype=dtype), width)
  config_lib.validate(config)
  assert config.latent_dim == width
  return model


def read(model, dtype):
  """Logits of tokens read through a cache, and the cache."""
  cache = allocate_cache(model, batch=2, slots=21, dtype=dtype)
  return jax.jit(lambda model, cache: decode(model, cache, TOKENS))(model, cache)


@pytest.mark.parametrize('width', WIDTHS[:-1])
@pytest.mark.parametrize('dtype', cache_lib.DTYPES)
def test_the_tail_is_not_seen_by_the_prefix(width, dtype):
  """An encoder that computes the whole latent, and drops the tail, gives the very same logits."""
  compute = 'float32' if dtype == 'int8' else dtype
  model = cut_model(width, compute)
  expected, cache = read(model, dtype)
  attention = nnx.split(whole_model(compute).blocks.attention)
  called = []

  def encode(self, x, positions):
    """compress with layer `called`'s whole weights."""
    index = len(called)
    called.append(index)
    weights = jax.tree.map(lambda leaf: leaf[index], attention[1])
    entries = LatentAttention.compress(nnx.merge(attention[0], weights), x, positions)
    assert len(entries) == 4
    return {name: entries[name] for name in self.cache_shapes()}

  with mock.patch.object(nested.NestedLatentAttention, 'compress', encode):
    logits, _ = read(model, dtype)
  assert len(called) == model.num_layers
  np.testing.assert_array_equal(logits, expected)
  assert cache.bytes_per_token() == 2 * sum(
    {'float32': 4, 'bfloat16': 2, 'int8': 1}[dtype] * shape[0] + 4 * (dtype == 'int8')
    for shape in model.blocks.attention.cache_shapes().values()
  )


def test_each_block_has_its_own_norm():
  attention = whole_model().blocks.attention
  graphdef, stacked = nnx.split(attention)
  layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], stacked))
  x = jax.random.normal(jax.random.key(1), (2, 5, 32))
  entries = layer.compress(x, jnp.arange(5)[None])
  raw, gain = np.asarray(project(x, layer.w_dkv)), np.asarray(layer.latent_norm.gain[...])
  for start, end in ((0, 4), (4, 8), (8, 14)):
    block = raw[..., start:end]
    rms = np.sqrt(np.mean(block**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
      entries[f'latent_{end}'], block / rms * gain[start:end], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('width', WIDTHS)
def test_a_row_cut_in_training_is_the_smaller_model(width):
  """Each row of a batch by its own width; the last is whole."""
  widths = jnp.array([[width] * 2, [14] * 2])
  logits = states(whole_model(), TOKENS, widths) @ whole_model().unembedding()
  np.testing.assert_allclose(logits[0], forward(cut_model(width), TOKENS)[0], atol=2e-5)
  np.testing.assert_allclose(logits[1], forward(whole_model(), TOKENS)[1], atol=2e-5)


def test_a_cut_row_teaches_the_tail_nothing():
  widths = jnp.full((2, 2), 8)
  graphdef, params = nnx.split(whole_model())

  def loss(params):
    return step_lib.mean_nll(nnx.merge(graphdef, params), TOKENS, widths)

  attention = jax.grad(loss)(params)['blocks']['attention']
  for name, axis in (('w_dkv', 2), ('w_uk', 1), ('w_uv', 1)):
    head, tail = jnp.split(attention[name][...], [8], axis=axis)
    assert np.all(tail == 0) and np.any(head != 0), name


def test_widths_are_drawn_anew_each_step_and_the_same_again():
  key = jax.random.key(0)
  drawn = np.array([nested.draw_widths((8, 16, 64), key, jnp.int32(s), 8) for s in range(200)])
  again = nested.draw_widths((8, 16, 64), key, jnp.int32(7), 8)
  np.testing.assert_array_equal(drawn[7], again)
  assert set(drawn.ravel()) == {8, 16, 64}
  # A half or a quarter, and a third of a quarter.
  for width, share in ((8, 1 / 3), (16, 1 / 12), (64, 7 / 12)):
    assert abs(np.mean(drawn == width) - share) < 0.04
  # No row is always whole, or a device that has it alone would learn but one width.
  assert np.all([len(set(drawn[:, row])) == 3 for row in range(8)])


def test_training_steps_cut_by_the_state_that_a_checkpoint_holds():
  config = tiny_config('mla_nested', accumulation_steps=2)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, VOCAB)))
  optimizer = make_optimizer(config)
  params = nnx.state(whole_model(), nnx.Param)  # in which a width makes a difference
  state = step_lib.init_state(config, VOCAB, optimizer)
  state = state._replace(step=jnp.int32(3), params=params)
  tokens = jax.random.randint(jax.random.key(2), (8, 33), 0, VOCAB)
  _, measured = jax.jit(functools.partial(step_lib.train_step, config, graphdef, optimizer))(
    state, tokens
  )
  rows = nested.draw_widths(WIDTHS, state.key, jnp.int32(3), 8)
  widths = jnp.stack([rows] * 2, axis=1)
  expected = step_lib.mean_nll(nnx.merge(graphdef, state.params), tokens, widths)
  np.testing.assert_allclose(measured['loss'], expected, rtol=1e-5)
  whole = step_lib.mean_nll(nnx.merge(graphdef, state.params), tokens)
  assert abs(float(whole - expected)) > 1e-4


@pytest.mark.parametrize('given', ['8', '8,14,', '8,8,14', '14,8', '0,14', 'a,14', '8, 14', '8,16'])
def test_widths_that_cannot_be_are_refused(given):
  with pytest.raises(UserError, match=f'^nested={given}: must '):
    config_lib.validate(tiny_config('mla', nested=given))


def test_a_latent_without_a_norm_has_no_blocks():
  with pytest.raises(UserError, match='^nested=8,14: needs latent_norm=True'):
    config_lib.validate(tiny_config('mla', nested='8,14', latent_norm=False))
