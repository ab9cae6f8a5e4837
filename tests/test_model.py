import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_in, tiny_config
from flax import nnx

from configs import gqa_small, mha_small, mla_small, mqa_small
from mla.errors import UserError
from mla.model import (
  Decoder,
  allocate_cache,
  count_params,
  forward,
  generate,
  make_model,
  prefill,
  sample,
  solve_ffn_dim,
)

SMALL = {'mha': mha_small, 'gqa': gqa_small, 'mqa': mqa_small, 'mla': mla_small}


def test_the_width_is_solved_whatever_the_attention(arm):
  config = tiny_config(arm, ffn_dim=0, param_budget=50_000)
  width = solve_ffn_dim(config)
  config.ffn_dim = width
  model = Decoder(config, 10, nnx.Rngs(0))
  by_hand = sum(
    int(np.prod(leaf.shape))
    for path, leaf in nnx.to_flat_state(nnx.state(model))
    if path[0] not in ('embedding', 'w_out')
  )
  assert abs(by_hand - 50_000) <= 0.0025 * 50_000
  assert count_params(model) == (by_hand + 2 * 10 * 32, by_hand)


def test_mla_small_keeps_at_most_a_quarter_of_mha_small():
  def bytes_per_token(config):
    model = nnx.eval_shape(lambda: make_model(config, 257))
    return allocate_cache(model, batch=1, slots=4, dtype='bfloat16').bytes_per_token()

  mha, mla = (bytes_per_token(SMALL[name].get_config()) for name in ('mha', 'mla'))
  assert mla * 4 <= mha


def test_layers_start_different():
  blocks = make_model(tiny_config(), 10).blocks
  assert not np.allclose(blocks.ffn.w_up[0], blocks.ffn.w_up[1])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  keys = jax.random.split(jax.random.key(0), 4000)

  def shares(top_p, temperature=1.0):
    draw = jax.vmap(lambda key: sample(logits, key, temperature=temperature, top_p=top_p)[0])
    return np.bincount(np.asarray(draw(keys)), minlength=4) / len(keys)

  np.testing.assert_allclose(shares(0.7), [0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_allclose(shares(0.4), [1, 0, 0, 0], atol=0)
  np.testing.assert_allclose(shares(1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
  squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
  np.testing.assert_allclose(shares(1.0, 0.5), squared / squared.sum(), atol=0.03)


def test_what_does_not_fit_in_the_cache_is_refused():
  model = make_model(tiny_config(), 10)
  cache = allocate_cache(model, batch=1, slots=8, dtype='float32')
  prompt, lengths = jnp.zeros((1, 9), jnp.int32), jnp.array([9])
  with pytest.raises(ValueError, match='8 slots'):
    prefill(model, cache, prompt, lengths)
  with pytest.raises(ValueError, match='8 cache slots'):
    generate(model, cache, prompt[:, :4], jnp.array([4]), jax.random.key(0), steps=5)


def test_prefill_makes_logits_only_of_each_rows_last_token():
  model, vocab = make_model(tiny_config(), 61), 61
  cache = allocate_cache(model, batch=4, slots=8, dtype='float32')
  prompts, lengths = jnp.ones((4, 8), jnp.int32), jnp.array([8, 0, 9, -1])
  logits, _ = prefill(model, cache, prompts, lengths)
  assert [bool(jnp.all(jnp.isnan(row))) for row in logits] == [False, True, True, True]

  def largest(function, *inputs) -> int:
    """The most elements of an array with the vocabulary's axis."""
    program = jax.make_jaxpr(lambda *inputs: function(model, *inputs))(*inputs)
    return max(x.size for x in arrays_in(program.jaxpr) if x.shape[-1:] == (vocab,))

  assert largest(prefill, cache, prompts, lengths) == 4 * vocab
  assert largest(forward, prompts) == 4 * 8 * vocab


def test_round_to_makes_the_width_and_the_vocabulary_divide():
  _, budget = count_params(make_model(tiny_config('mla', ffn_dim=48), 61))
  config = tiny_config('mla', ffn_dim=0, param_budget=budget + 60, round_to=16)
  model = make_model(config, 61)
  assert model.w_out.shape == (32, 64) and model.embedding.shape == (64, 32)
  assert model.blocks.ffn.w_gate.shape[-1] == 48
  with pytest.raises(UserError, match='round_to=1024: no ffn_dim .* param_budget=40000'):
    solve_ffn_dim(tiny_config('mla', ffn_dim=0, param_budget=40_000, round_to=1024))


@pytest.mark.parametrize(('temperature', 'top_p'), [(0.0, 1.0), (5.0, 0.9999999)])
def test_what_rounds_the_vocabulary_is_never_written(temperature, top_p):
  """Although one of its columns, or the other, would win each time."""
  model = make_model(tiny_config('mla', num_layers=1, round_to=16), 61)
  model.w_out[...] = model.w_out[...].at[:, 61].set(50.0).at[:, 62].set(-50.0)
  prompts = jax.random.randint(jax.random.key(1), (4, 5), 0, 61)
  logits = forward(model, prompts)
  assert logits.shape == (4, 5, 64) and np.all(logits[..., 61:] == -np.inf)
  assert np.all(np.isfinite(logits[..., :61]))
  cache = allocate_cache(model, batch=4, slots=40, dtype='float32')
  key, lengths = jax.random.key(2), jnp.full(4, 5)
  tokens, _ = generate(
    model, cache, prompts, lengths, key, steps=30, temperature=temperature, top_p=top_p
  )
  assert np.all((tokens >= 0) & (tokens < 61))
