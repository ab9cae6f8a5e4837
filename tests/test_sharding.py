"""Which weights are split, and what is said of those that are not."""

import functools
import math

import jax
import pytest
from conftest import tiny_config
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from configs import mla_medium
from mla import sharding
from mla.model import make_model
from mla.optimizer import make_optimizer
from mla.step import init_state


def mesh_of(*sizes: int) -> AbstractMesh:
  return AbstractMesh(sizes, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)


def test_fsdp_splits_weights_and_moments():
  config = mla_medium.get_config()
  state = jax.eval_shape(functools.partial(init_state, config, 32_000, make_optimizer(config)))
  placed = sharding.placed(state, sharding.shardings(state, mesh_of(1, 4, 1)))
  arrays = jax.tree.leaves((placed.params, placed.opt_state))
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
  held = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in arrays
  )
  assert held <= 1.05 * whole / 4
  assert sharding.whole_weights(placed.params, mesh_of(1, 4, 1)) == {}


def test_a_mesh_axis_splits_one_axis_of_a_weight(arm):
  model = nnx.eval_shape(lambda: make_model(tiny_config(arm), 64))
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    spec = sharding.weight_spec(leaf.get_metadata('axes'), leaf.shape, mesh_of(1, 2, 2))
    named = jax.tree.leaves(tuple(spec))
    assert len(set(named)) == len(named), path
    assert 'fsdp' in named, path


@pytest.mark.parametrize('fsdp', [1, 4])
def test_what_is_whole_is_named(monkeypatch, fsdp):
  """A latent of 14 does not split in four."""
  monkeypatch.setattr(sharding, 'LARGE', 1000)
  config = tiny_config('mla')
  params = nnx.state(nnx.eval_shape(lambda: make_model(config, 64)), nnx.Param)
  up = 4 * config.num_layers * 14 * 4  # float32, layers, C, H
  expected = {'blocks.attention.w_uk': up * 6, 'blocks.attention.w_uv': up * 10}
  assert sharding.whole_weights(params, mesh_of(1, fsdp, 1)) == (expected if fsdp > 1 else {})
