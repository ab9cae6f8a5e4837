"""The search over layers' widths, against trying by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config

from mla import budgets
from mla.cutting import cut_layers
from mla.model import allocate_cache, decode, make_model

VOCAB = 61
WINDOWS = np.asarray(jax.random.randint(jax.random.key(5), (3, 21), 0, VOCAB))
CONFIG = tiny_config('mla_nested')


def trained_model():
  """Whose later blocks say something, as they don't at first."""
  model = make_model(CONFIG, VOCAB)
  for key, up in enumerate((model.blocks.attention.w_uk, model.blocks.attention.w_uv)):
    up[...] = jax.random.normal(jax.random.key(key), up[...].shape) / 4
  return model


def predictions(model):
  cache = allocate_cache(model, batch=3, slots=20, dtype='float32')
  return jax.nn.log_softmax(decode(model, cache, jnp.asarray(WINDOWS[:, :-1]))[0])


def test_the_divergence_is_that_of_the_model_that_is_cut():
  model = trained_model()
  whole, cut = predictions(model), predictions(cut_layers(model, CONFIG, (8, 4)))
  expected = np.mean(np.sum(np.exp(whole) * (whole - cut), axis=-1))
  np.testing.assert_allclose(budgets.divergence(model, WINDOWS, (8, 4)), expected, rtol=1e-3)
  assert budgets.divergence(model, WINDOWS, (14, 14)) == 0


def test_documents_of_a_row_are_judged_apart():
  model = trained_model()
  starts = np.where(np.arange(20) < 8, 0, 8)[None].repeat(3, axis=0)
  found = budgets.divergence(model, WINDOWS, (8, 4), starts)
  first = budgets.divergence(model, WINDOWS[:, :9], (8, 4))  # the last token is only a target
  second = budgets.divergence(model, WINDOWS[:, 8:], (8, 4))
  np.testing.assert_allclose(found, (8 * first + 12 * second) / 20, rtol=1e-3)
  assert abs(found / budgets.divergence(model, WINDOWS, (8, 4)) - 1) > 0.01


def test_each_step_takes_what_adds_least_for_what_it_frees(monkeypatch):
  cost = {pair: sum(pair) for pair in itertools.product((4, 8, 14), repeat=2)}
  cost |= {(14, 14): 0.0, (8, 14): 0.5, (14, 8): 0.6, (4, 14): 0.6, (8, 8): 1.4, (4, 8): 1.0}
  monkeypatch.setattr(budgets, 'divergence', lambda model, windows, widths, starts: cost[widths])
  found = list(budgets.search(make_model(CONFIG, VOCAB), CONFIG, WINDOWS))
  # (8, 14) frees 6 for 0.5; then (4, 14) frees 4 for 0.1, against (8, 8), 6 for 0.9.
  assert [budget.widths for budget in found] == [(14, 14), (8, 14), (4, 14), (4, 8), (4, 4)]
  assert [budget.divergence for budget in found[:3]] == [0, 0.5, 0.6]


def test_a_layer_that_reads_nothing_of_its_latent_is_cut_first():
  model = trained_model()
  attention = model.blocks.attention
  for up in (attention.w_uk, attention.w_uv):
    up[...] = up[...].at[1].set(0)
  found = [budget.widths for budget in budgets.search(model, CONFIG, WINDOWS)]
  assert found[:3] == [(14, 14), (14, 8), (14, 4)] and found[-1] == (4, 4)
