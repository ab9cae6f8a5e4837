"""Latents cut in each layer by itself, and plain latents turned and cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from mla.cutting import cut_latent, cut_layers, cut_plain, latent_moments, rotate_latent
from mla.model import allocate_cache, decode, forward, make_model, states

VOCAB = 61
TOKENS = jax.random.randint(jax.random.key(5), (2, 21), 0, VOCAB)


@functools.cache
def model_of(arm: str):
  model = make_model(tiny_config(arm), VOCAB)
  gain = model.blocks.attention.latent_norm.gain  # no longer all alike, as after training
  gain[...] = 1 + 0.3 * jnp.cos(jnp.arange(gain[...].size)).reshape(gain[...].shape)
  for key, up in enumerate((model.blocks.attention.w_uk, model.blocks.attention.w_uv)):
    up[...] = jax.random.normal(jax.random.key(key), up[...].shape) / 4
  return model


def read(model, dtype='float32'):
  cache = allocate_cache(model, batch=2, slots=21, dtype=dtype)
  return jax.jit(lambda model, cache: decode(model, cache, TOKENS))(model, cache)


@pytest.mark.parametrize('widths', [(4, 14), (14, 8), (8, 8)])
def test_each_layer_keeps_a_prefix_of_its_own(widths):
  """Smaller arrays give what training saw of a row that was cut so, layer by layer."""
  whole = model_of('mla_nested')
  logits, cache = read(cut_layers(whole, tiny_config('mla_nested'), widths))
  cut = states(whole, TOKENS, jnp.array([widths] * 2)) @ whole.unembedding()
  np.testing.assert_allclose(logits, cut, atol=2e-5)
  assert cache.bytes_per_token() == 4 * sum(width + 4 for width in widths)


def test_layers_cut_alike_are_the_model_that_is_cut():
  config = tiny_config('mla_nested')
  logits, cache = read(cut_layers(model_of('mla_nested'), config, (8, 8)), 'bfloat16')
  expected, of_model = read(cut_latent(model_of('mla_nested'), config, 8)[0], 'bfloat16')
  np.testing.assert_array_equal(logits, expected)
  assert cache.bytes_per_token() == of_model.bytes_per_token()


def test_moments_of_documents_in_a_row_are_those_of_each_alone():
  model = model_of('mla')
  starts = jnp.where(jnp.arange(21) < 9, 0, 9)[None].repeat(2, axis=0)
  apart = latent_moments(model, TOKENS[:, :9]) * 9 + latent_moments(model, TOKENS[:, 9:]) * 12
  np.testing.assert_allclose(latent_moments(model, TOKENS, starts), apart / 21, atol=1e-5)
  assert abs(latent_moments(model, TOKENS) - apart / 21).max() > 1e-3


def test_a_turned_latent_is_the_same_function_with_its_axes_in_order():
  model = model_of('mla')
  moments = latent_moments(model, TOKENS)
  np.testing.assert_allclose(np.trace(moments, axis1=1, axis2=2), 14, rtol=1e-4)
  turned = rotate_latent(model, moments)
  np.testing.assert_allclose(forward(turned, TOKENS), forward(model, TOKENS), atol=2e-5)
  np.testing.assert_allclose(read(turned)[0], read(model)[0], atol=2e-5)
  after = latent_moments(turned, TOKENS)
  energy = np.diagonal(after, axis1=1, axis2=2)
  np.testing.assert_allclose(energy, np.linalg.eigvalsh(moments)[:, ::-1], atol=1e-4)
  np.testing.assert_allclose(after, [np.diag(of_layer) for of_layer in energy], atol=1e-4)
  assert not np.allclose(turned.blocks.attention.w_uk[...], model.blocks.attention.w_uk[...])


def test_a_plain_latent_cut_to_all_of_it_is_the_model():
  model = model_of('mla')
  cut = cut_plain(model, tiny_config('mla'), 14, latent_moments(model, TOKENS))
  np.testing.assert_allclose(forward(cut, TOKENS), forward(model, TOKENS), atol=2e-5)


def test_a_plain_latent_without_weight_in_its_tail_loses_nothing_by_the_cut():
  """What the smaller norm divides too little by, its gain makes up for."""
  model = make_model(tiny_config('mla'), VOCAB)
  attention = model.blocks.attention
  attention.w_dkv[...] = attention.w_dkv[...].at[:, :, 5:].set(0)
  cut = cut_plain(model, tiny_config('mla'), 5, latent_moments(model, TOKENS))
  np.testing.assert_allclose(forward(cut, TOKENS), forward(model, TOKENS), atol=1e-4)
  assert read(cut)[1].bytes_per_token() == 2 * 4 * (5 + 4)
