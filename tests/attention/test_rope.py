"""Stretched rotation against plain formulas; tests/interop holds it against transformers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from mla import rope_scaling
from mla.attention.rope import Rotation, rope, rotation_of
from mla.errors import UserError
from mla.model import count_params, forward, make_model

YARN = 'yarn:factor=4,original=64,mscale=0.7,mscale_all_dim=1'
LLAMA3 = 'llama3:factor=8,original=256,low=1,high=4'
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 20)).astype(np.int32)


@pytest.mark.parametrize('text', [YARN, LLAMA3])
def test_fast_pairs_stay_and_slow_ones_are_slowed(text):
  plain = Rotation(10_000.0, 'none').frequencies(64)
  scaled = Rotation(10_000.0, text).frequencies(64)
  factor = rope_scaling.parse(text).numbers['factor']
  np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
  np.testing.assert_allclose(scaled[-1], plain[-1] / factor, rtol=1e-6)
  assert (np.diff(scaled / plain) <= 1e-7).all()


def test_yarn_scales_the_rotary_part_and_the_scores():
  assert Rotation(100.0, YARN).amplitude == pytest.approx(
    (0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
  )
  assert Rotation(100.0, YARN).sharpness == pytest.approx((0.1 * math.log(4) + 1) ** 2)
  x = jnp.ones((1, 1, 8))
  turned = rope(x, np.zeros((1, 1), int), Rotation(100.0, YARN))
  np.testing.assert_allclose(turned, Rotation(100.0, YARN).amplitude * x, rtol=1e-6)


@pytest.mark.parametrize(
  'text',
  [
    'linear:factor=2',
    'yarn',
    'yarn:factor=4',
    'yarn:factor=4,original=x',
    'yarn:factor=4,original=64,factor=2',
    'yarn:factor=0.5,original=64',
    'llama3:factor=8,original=256,low=4,high=4',
    'none:factor=2',
  ],
)
def test_a_wrong_scaling_is_told(text):
  with pytest.raises(UserError, match=f'rope_scaling={text}: '):
    rope_scaling.parse(text)


@pytest.mark.parametrize('text', [YARN, LLAMA3])
def test_a_scaling_is_spelled_as_it_is_read(text):
  scaling = rope_scaling.parse(text)
  assert rope_scaling.parse(rope_scaling.spell(*scaling)) == scaling


def test_scaling_reaches_every_variant(arm):
  plain, stretched = (
    forward(make_model(tiny_config(arm, rope_scaling=text), 61), jnp.asarray(TOKENS))
    for text in ('none', YARN)
  )
  assert np.abs(np.asarray(plain - stretched))[0, -1].max() > 1e-4
  assert rotation_of(tiny_config(arm)).amplitude == 1 == rotation_of(tiny_config(arm)).sharpness


def test_tied_embeddings_make_the_logits(arm):
  untied, tied = (make_model(tiny_config(arm, tie_embeddings=tie), 61) for tie in (False, True))
  assert count_params(untied)[1] == count_params(tied)[1]
  assert count_params(untied)[0] - count_params(tied)[0] == untied.w_out.size
  untied.w_out[...] = untied.embedding[...].T
  for name in ('blocks', 'norm', 'embedding'):
    setattr(tied, name, getattr(untied, name))
  tokens = jnp.asarray(TOKENS)
  np.testing.assert_array_equal(forward(untied, tokens), forward(tied, tokens))
