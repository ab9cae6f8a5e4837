"""Costs read from compiled programs, against the papers' formulas and real arrays."""

import jax
import pytest
from conftest import tiny_config

from mla import cost
from mla.config import REMATS
from mla.model import allocate_cache, count_params, make_model

VOCAB = 61


def wide_config(arm: str, **changes):
  """Wide enough that elementwise work is a small part."""
  sizes = {'d_model': 128, 'num_heads': 4, 'head_dim': 32, 'value_head_dim': 0, 'ffn_dim': 256}
  fields = {**sizes, 'seq_len': 64, 'batch_size': 4, 'num_layers': 3}
  config = tiny_config(arm, **{**fields, **changes})
  if arm == 'mla':
    config.update({'latent_dim': 64, 'rope_dim': 32})
  return config


@pytest.mark.parametrize('arm', ['mha', 'mla'])
def test_flops_are_six_a_weight_and_attention(arm):
  """6 FLOPs a weight and token (Kaplan et al. 2020, arXiv 2001.08361), 6 T a head's q and v dim."""
  config = wide_config(arm)
  model = make_model(config, VOCAB)
  weights = count_params(model)[1] + config.d_model * VOCAB  # the embedding is looked up
  heads = config.num_heads * config.num_layers * config.seq_len
  attention = 6 * heads * ((config.head_dim + config.rope_dim) + config.head_dim)
  expected = 6 * weights + attention
  assert expected < cost.train_flops_per_token(config, VOCAB) < 1.12 * expected


def test_flops_grow_by_whole_layers():
  one, two, five = (
    cost.train_flops_per_token(wide_config('mha', num_layers=n), VOCAB) for n in (1, 2, 5)
  )
  assert five == pytest.approx(one + 4 * (two - one), rel=1e-3)


def test_flops_do_not_hide_in_loops():
  plain = cost.train_flops_per_token(wide_config('mha'), VOCAB)
  for changes in ({'remat': 'full'}, {'accumulation_steps': 2}):
    assert cost.train_flops_per_token(wide_config('mha', **changes), VOCAB) == plain


def test_keeping_only_the_latents_keeps_less():
  costs = cost.training_costs(wide_config('mla'), VOCAB)['training_memory']
  config = wide_config('mla')
  batch = config.batch_size * config.seq_len
  latents = batch * config.num_layers * (config.latent_dim + config.rope_dim) * 4
  assert latents < costs['latents']['activation_bytes'] < costs['none']['activation_bytes'] / 3
  assert costs['latents']['peak_bytes'] < costs['none']['peak_bytes']


@pytest.mark.parametrize('arm', ['mha', 'mla'])
def test_what_each_remat_keeps(arm):
  """Of a layer full keeps the input, latents the cache's entries too, block attention's output and
  the sums of its softmax; of the rest of the model they keep the same."""
  config = wide_config(arm, attention_impl='blockwise', dtype='bfloat16')
  kept = {remat: cost.activation_bytes(config, VOCAB, remat) for remat in REMATS}
  config.num_layers -= 1
  fewer = cost.activation_bytes(config, VOCAB, 'full')
  tokens = config.batch_size * config.seq_len
  assert kept['full'] - fewer == tokens * 2 * config.d_model
  tokens *= 3  # in all layers
  entries = {'mha': 2 * 4 * 32, 'mla': 64 + 32}[arm]
  assert kept['latents'] - kept['full'] == tokens * 2 * entries
  assert kept['block'] - kept['full'] == tokens * (2 * 4 * 32 + 4 * 4)
  assert kept['none'] > 3 * max(kept['latents'], kept['block'])


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_cache_bytes_are_those_of_allocated_arrays(arm, dtype):
  config = tiny_config(arm)
  cache = allocate_cache(make_model(config, VOCAB), batch=3, slots=17, dtype=dtype)
  found = cost.cache_bytes(config, VOCAB, batch=3, context=17, dtype=dtype)
  assert found == sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
