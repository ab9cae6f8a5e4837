"""The arms of every size: equal in what they may learn with, and whole on a mesh."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mla import config as config_lib
from mla import memory, sharding
from mla.model import count_params, make_model
from mla.optimizer import make_optimizer
from mla.step import init_state, jit_step

ARMS = ('mha', 'gqa', 'mqa', 'mla')
# Parameters in all, about; tokens a window.
SIZES = {'small': (0.867e6, 256), 'medium': (134e6, 1024), 'large': (1.345e9, 2048)}


def load(arm: str, size: str):
  return importlib.import_module(f'configs.{arm}_{size}').get_config()


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('arm', ARMS)
def test_sizes(arm, size):
  config = load(arm, size)
  config_lib.validate(config)
  model = nnx.eval_shape(lambda: make_model(config, memory.vocabulary(config)))
  total, body = count_params(model)
  parameters, window = SIZES[size]
  assert config.attention == arm and config.seq_len == window
  assert total == pytest.approx(parameters, rel=0.005)
  tolerance, multiple = {'small': (0.0025, 2), 'medium': (0.004, 32), 'large': (0.003, 128)}[size]
  assert abs(body - config.param_budget) <= tolerance * config.param_budget
  assert model.blocks.ffn.w_gate.shape[-1] % multiple == 0  # splits over a tensor axis
  assert model.w_out.shape[-1] % multiple == 0 or size == 'small'


@pytest.mark.parametrize('size', ['medium', 'large'])
def test_arms_differ_in_their_attention_only(size):
  attention = {'attention', 'num_kv_heads', 'latent_dim', 'rope_dim'}
  rest = [
    {name: v for name, v in config_lib.flatten(load(arm, size)).items() if name not in attention}
    for arm in ARMS
  ]
  assert all(other == rest[0] for other in rest)


@pytest.mark.parametrize('size', ['medium', 'large'])
@pytest.mark.parametrize('arm', ARMS)
def test_two_layers_are_traced_and_sharded(arm, size):
  """On eight devices, with as many rows at once as they are; nothing is compiled."""
  config = load(arm, size)
  config.update({'num_layers': 2, 'ffn_dim': 2048, 'batch_size': 8, 'accumulation_steps': 1})
  config.mesh = {'data': 1, 'fsdp': -1, 'tensor': 1}
  mesh = sharding.make_mesh(config.mesh.to_dict())
  vocab = memory.vocabulary(config)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 8, 'tensor': 1} and vocab == 32_000
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    abstract = jax.eval_shape(functools.partial(init_state, config, vocab, optimizer))
    placement = sharding.shardings(abstract, mesh)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, vocab)))
    rows = jax.ShapeDtypeStruct(
      (8, config.seq_len + 1), jnp.int32, sharding=sharding.rows_sharding(mesh)
    )
    traced = jit_step(config, graphdef, optimizer, placement).trace(
      sharding.placed(abstract, placement), rows
    )
  after, measured = traced.out_info
  assert measured['loss'].shape == ()
  sizes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after)
  assert sizes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
  weights = jax.tree.leaves(sharding.placed(abstract, placement).params)
  a_device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in weights)
  assert a_device < 1.2 / 8 * sum(leaf.size for leaf in weights)
