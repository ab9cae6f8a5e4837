"""Compression after the fact: exact where nothing has to be lost, each method best at its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from mla.convert import compress
from mla.data.pipeline import EvalWindows
from mla.errors import UserError
from mla.model import allocate_cache, decode, forward, make_model

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)


def drawn(arm: str, **fields):
  config = tiny_config(arm, value_head_dim=10, **fields)
  return config, make_model(config, 61)


def covariances(model):
  return compress.input_covariances(model, TOKENS)


def share_what_turns(model, turned: int) -> None:
  """Each key head's turning part a multiple, turned itself by an angle, of the first one's."""
  w_k = np.array(model.blocks.attention.w_k[...])
  half, rng = turned // 2, np.random.default_rng(1)
  z = w_k[..., :half] + 1j * w_k[..., half:turned]
  factor = rng.standard_normal(z.shape[2:]) + 1j * rng.standard_normal(z.shape[2:])
  z = z[:, :, :1] * factor
  w_k[..., :half], w_k[..., half:turned] = z.real, z.imag
  model.blocks.attention.w_k[...] = jnp.asarray(w_k)


@pytest.mark.parametrize(
  'arm, turned, method',
  [
    ('mqa', 6, 'svd'),
    ('gqa', 6, 'whitened'),
    ('mha', 6, 'two_sided'),
    ('mha_partial_rope', 2, 'whitened'),
  ],
)
def test_exact_at_full_rank_where_the_heads_share_what_turns(arm, turned, method):
  config, model = drawn(arm)
  share_what_turns(model, turned)
  rank = min(32, model.blocks.attention.w_k.shape[2] * 16)
  new, small = compress.convert(config, model, covariances(model), rank, turned, method)
  expected = forward(model, jnp.asarray(TOKENS))
  np.testing.assert_allclose(forward(small, jnp.asarray(TOKENS)), expected, atol=2e-4)
  cache = allocate_cache(small, batch=2, slots=24, dtype='float32')
  np.testing.assert_allclose(decode(small, cache, jnp.asarray(TOKENS))[0], expected, atol=2e-4)
  assert cache.bytes_per_token() == 2 * 4 * (rank + turned)
  assert new.attention == 'mla'


def test_padding_is_no_target():
  model = drawn('gqa')[1]
  windows = EvalWindows(TOKENS, np.ones((2, 23), bool))
  mask = np.zeros((4, 23), bool)
  mask[:2] = True
  padded = EvalWindows(np.concatenate([TOKENS, TOKENS[::-1] // 2]), mask)
  assert compress._loss(model, padded) == pytest.approx(compress._loss(model, windows), rel=1e-6)


def test_what_no_longer_turns_is_lost():
  """Heads that share nothing, and half of the frequencies: rotary loss, whatever the rank."""
  config, model = drawn('mha', head_dim=8)
  expected = forward(model, jnp.asarray(TOKENS))
  errors = []
  for rope_dim in (8, 4):
    small = compress.convert(config, model, covariances(model), 32, rope_dim, 'svd')[1]
    difference = np.asarray(forward(small, jnp.asarray(TOKENS)) - expected)
    np.testing.assert_allclose(difference[:, 0], 0, atol=2e-4)  # a token alone has no distance
    errors.append(np.abs(difference[:, -1]).mean())
  assert 1e-3 < errors[0] < errors[1]


@pytest.mark.parametrize('latent_dim', [3, 8, 20])
def test_each_method_has_the_least_error_of_its_own_kind(latent_dim):
  """Of what it minimises: on white inputs, on those that there are, and seen through its lenses."""
  rng = np.random.default_rng(0)
  w_q, w_k = rng.standard_normal((32, 4, 6)), rng.standard_normal((32, 2, 6))
  w_v, w_o = rng.standard_normal((32, 2, 10)), rng.standard_normal((4, 10, 32))
  spread = rng.standard_normal((32, 32)) * np.geomspace(1, 1e-2, 32)
  covariance = spread @ spread.T
  whole = np.concatenate([w_k, w_v], axis=-1).reshape(32, -1)

  def error(method: str) -> tuple[float, float]:
    down, up = compress._joint(w_q, w_k, w_v, w_o, covariance, latent_dim, method)
    off = down @ up - whole
    return np.sum(off**2), np.trace(off.T @ covariance @ off)

  errors = {method: error(method) for method in compress.METHODS}
  assert errors['svd'][0] == min(white for white, _ in errors.values())
  assert errors['whitened'][1] == min(real for _, real in errors.values())
  # The plain one's is what the singular values beyond the latent say.
  beyond = np.linalg.svd(whole, compute_uv=False)[latent_dim:]
  assert errors['svd'][0] == pytest.approx(np.sum(beyond**2))


@pytest.mark.parametrize(
  'arm, sizes, match',
  [
    ('mla', (4, 4), 'attention=mla'),
    ('gqa', (4, 4), '--rope_dim=4'),
    ('gqa', (4, 3), '--rope_dim=3'),
    ('gqa', (0, 6), '--latent_dim=0'),
    ('gqa', (33, 6), '--latent_dim=33: .*at most 32'),
  ],
)
def test_sizes_that_do_not_fit(arm, sizes, match):
  with pytest.raises(UserError, match=match):
    compress._check(tiny_config(arm), *sizes, 'svd')
