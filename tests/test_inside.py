"""Looking into a run: against the model itself, which looks at nothing of this."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, tiny_config

from mla import evaluate, inside
from mla import model as model_lib
from mla.data.pipeline import EvalWindows

VOCAB = 50


@pytest.fixture(scope='module')
def model():
  return model_lib.make_model(tiny_config('mla', num_layers=1), VOCAB)


@pytest.fixture(scope='module')
def texts():
  return np.random.default_rng(0).integers(0, VOCAB, (6, 17)).astype(np.int32)


def test_effective_rank_counts_equal_axes():
  rng = np.random.default_rng(0)
  axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  for rank in (1, 3, 8):
    cloud = np.concatenate([axes[:rank], -axes[:rank]])  # the same variance along each
    shares = inside.spectrum(cloud)
    assert shares.sum() == pytest.approx(1) and (np.diff(shares) <= 1e-12).all()
    assert inside.effective_rank(shares) == pytest.approx(rank)
  assert inside.spectrum(axes[:2]).shape == (8,)  # fewer vectors than dims


def test_what_is_kept_is_what_the_cache_holds(model, texts):
  kept = inside.kept(model, texts[:, :-1])
  assert kept['latent'].shape == (1, 6, 16, 14) and kept['k_rope'].shape == (1, 6, 16, 4)
  longer = inside.kept(model, texts[:, :-5])
  np.testing.assert_allclose(kept['latent'][:, :, :12], longer['latent'], atol=1e-5)


def test_attention_maps_make_the_attention_that_the_model_computes(model, texts):
  """The maps, over values made of the latents, give each layer's output."""
  tokens = jnp.asarray(texts[:2, :-1])
  maps = inside.attention_maps(model, tokens)
  assert maps.shape == (1, 2, 4, 16, 16)
  np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
  assert not np.triu(maps, 1).any()
  positions, x = np.arange(16)[None], model.embed(tokens)
  for block, seen in zip(model.layers(), maps, strict=True):
    h = block.attention_norm(x)
    entries = block.attention.compress(h, positions)
    values = jnp.einsum('bsc,chv->bshv', entries['latent'], block.attention.w_uv[...])
    out = jnp.einsum('bhts,bshv,hvd->btd', seen, values, block.attention.w_o[...])
    np.testing.assert_allclose(out, block.attention.attend(h, entries, positions), atol=1e-4)
    x, _ = block.parallel(x, positions)


def test_losses_are_those_of_the_model_and_of_the_evaluation(model, texts):
  whole = inside.losses(model, texts, {})
  logits = model_lib.forward(model, jnp.asarray(texts[:, :-1]))
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:])
  np.testing.assert_allclose(whole, nll, atol=1e-4)
  windows = EvalWindows(texts, np.ones((6, 16), bool))
  read = evaluate.read_through_cache(model, windows, 'int8', mesh_of((1, 1, 1)))
  both = inside.losses(model, texts, {'latent': 'int8', 'k_rope': 'int8'})
  np.testing.assert_allclose(both.sum(1), read.by_window, atol=1e-3)
  one = inside.losses(model, texts, {'latent': 'int8'})
  assert 0 < np.abs(one - whole).max() < 0.1 and np.abs(one - both).max() > 0


def test_no_more_is_read_at_a_time_than_memory_has_room_for(model, texts, monkeypatch):
  """A published model's logits over all windows would take tens of gigabytes."""
  whole = inside.losses(model, texts, {})
  read, sizes = inside._losses, []
  monkeypatch.setattr(inside, 'AT_ONCE', 2 * 17)
  monkeypatch.setattr(
    inside,
    '_losses',
    lambda model, texts, dtypes: sizes.append(texts.size) or read(model, texts, dtypes),
  )
  for count in (6, 5, 1):
    np.testing.assert_allclose(inside.losses(model, texts[:count], {}), whole[:count], atol=1e-5)
  assert set(sizes) == {17, 2 * 17} and len(sizes) == 3 + 3 + 1


def test_what_int8_costs_is_told_of_each_part_and_of_all(model, texts):
  costs = inside.cost_of_int8(model, texts, ('latent', 'k_rope'))
  assert list(costs) == ['latent', 'k_rope', 'latent and k_rope']
  more = inside.losses(model, texts, {'k_rope': 'int8'}) - inside.losses(model, texts, {})
  assert costs['k_rope'][0] == pytest.approx(more.mean(), abs=1e-9)
  assert all(error > 0 for _, error in costs.values())
