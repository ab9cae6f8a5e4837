"""Compression after the fact: exact where nothing has to be lost, each method best at its own."""

import jax
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


def observed(model):
  return compress.observe(model, TOKENS)


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
  rank = compress.full_rank(config, turned)
  new, small = compress.convert(config, model, observed(model), rank, turned, method)
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


def test_columns_that_round_the_vocabulary_are_no_tokens():
  config, model = drawn('gqa', round_to=64)
  assert model.embedding.shape[0] > model.vocab == 61
  logits = jax.nn.log_softmax(forward(model, jnp.asarray(TOKENS[:, :-1]))[..., :61])
  expected = -np.take_along_axis(np.asarray(logits), TOKENS[:, 1:, None], axis=-1).mean()
  windows = EvalWindows(TOKENS, np.ones((2, 23), bool))
  assert compress._loss(model, windows) == pytest.approx(expected, rel=1e-5)
  assert compress.convert(config, model, observed(model), 20, 6, 'svd')[1].vocab == 61


def test_what_pads_a_window_is_not_observed():
  mask = np.ones((3, 23), bool)
  mask[2, 9:] = False
  windows = EvalWindows(np.concatenate([TOKENS, TOKENS[:1]]), mask)
  np.testing.assert_array_equal(windows.without_padding().tokens, TOKENS)
  alone = EvalWindows(TOKENS[:1], mask[2:])
  np.testing.assert_array_equal(alone.without_padding().tokens, TOKENS[:1])


def test_at_full_rank_the_rank_loses_nothing_and_just_below_something():
  """Also where heads share nothing that turns: the rotary key has its own."""
  config, model = drawn('gqa')
  rank = compress.full_rank(config, 6)
  assert rank == 2 * (6 + 10) - 6
  seen = observed(model)
  models = [
    compress.convert(config, model, seen, width, 6, 'whitened')[1]
    for width in (config.d_model, rank, rank - 1)
  ]
  whole, full, less = (np.asarray(forward(small, jnp.asarray(TOKENS))) for small in models)
  np.testing.assert_allclose(full, whole, atol=2e-4)
  assert np.abs(less - whole).max() > 1e-2


def test_fewer_frequencies_lose_more():
  config, model = drawn('mha', head_dim=8)
  expected = forward(model, jnp.asarray(TOKENS))
  errors = []
  for rope_dim in (8, 4):
    small = compress.convert(config, model, observed(model), 32, rope_dim, 'svd')[1]
    errors.append(float(np.abs(forward(small, jnp.asarray(TOKENS)) - expected).mean()))
  assert 1e-3 < errors[0] < errors[1]


def test_what_is_observed():
  """Of the first layer, against loops over heads and tokens."""
  config, model = drawn('gqa')
  seen = observed(model)
  block = next(model.layers())
  h = np.asarray(block.attention_norm(model.embed(jnp.asarray(TOKENS))), np.float64)
  np.testing.assert_allclose(
    seen.covariances[0], np.einsum('btd,bte->de', h, h) / TOKENS.size, rtol=1e-4
  )
  frequencies = config.rope_base ** (-np.arange(3) / 3)
  for head in range(4):
    q = h @ np.asarray(block.attention.w_q[:, head], np.float64)
    k = h @ np.asarray(block.attention.w_k[:, head // 2], np.float64)
    q, k = (x[..., :3] + 1j * x[..., 3:] for x in (q, k))
    expected = np.zeros(3, complex)
    for row in range(2):
      for t in range(24):
        turned = np.exp(-1j * frequencies * (t - np.arange(t + 1))[:, None])
        scores = (q[row, t].conj() * k[row, : t + 1] * turned).sum(-1).real / 6**0.5
        weights = np.exp(scores - scores.max())
        expected += weights / weights.sum() @ turned
    np.testing.assert_allclose(seen.still[0, head], expected / TOKENS.size, atol=1e-5)


def test_what_no_longer_turns_stands_where_it_is_nearest_to_its_turning():
  """Of a head by itself beside the shared one: least error in its scores, weighted by attention."""
  config, model = drawn('mha', num_layers=1, head_dim=8)
  seen = observed(model)

  positions = np.arange(24)[None]
  h = next(model.layers()).attention_norm(model.embed(jnp.asarray(TOKENS)))
  attention = next(model.layers()).attention
  logits = attention.logits(h, attention.compress(h, positions), positions)
  maps = jax.nn.softmax(jnp.where(np.tril(np.ones((24, 24), bool)), logits, -jnp.inf))

  def error(still) -> float:
    small = compress.convert(config, model, seen._replace(still=still), 32, 2, 'svd')[1]
    attention = next(small.layers()).attention
    parts = attention.scores(h, attention.compress(h, positions), positions)
    return float((maps * jnp.square(sum(parts) - logits)).sum())

  assert error(seen.still) < 0.9 * error(np.full_like(seen.still, 1 - 1e-9))


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
    ('gqa', (27, 6), '--latent_dim=27: .*at most 26'),
  ],
)
def test_sizes_that_do_not_fit(arm, sizes, match):
  with pytest.raises(UserError, match=match):
    compress._check(tiny_config(arm), *sizes, 'svd')
