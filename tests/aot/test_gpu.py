"""What XLA's compiler for an H100 makes of the program, on a machine without one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import base
from mla import model as model_lib
from mla import sharding, train
from mla.cache import Cache
from mla.optimizer import make_optimizer

VOCAB = 512
# As CUDA describes the card.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ARMS = {
  'mha': {'attention': 'mha'},
  'gqa': {'attention': 'gqa', 'num_kv_heads': 2},
  'mqa': {'attention': 'mqa'},
  'mla': {'attention': 'mla', 'latent_dim': 32, 'rope_dim': 16},
}


@pytest.fixture(scope='module')
def mesh() -> Mesh:
  topology = topologies.get_topology_desc(
    platform='cuda', topology_name='h100', topology='1x1x1', target_config=H100
  )
  return Mesh(
    np.array(topology.devices).reshape(1, 1, 1),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
  )


def config_of(arm: str, **changes):
  config = base.get_config()
  config.update({
    'num_layers': 2, 'd_model': 64, 'num_heads': 4, 'head_dim': 32, 'ffn_dim': 128,
    'seq_len': 256, 'batch_size': 4, 'dtype': 'bfloat16',
    **ARMS[arm], **changes,
  })  # fmt: skip
  return config


def place(tree, mesh: Mesh):
  """Abstract arrays where training would have them."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    tree,
    sharding.shardings(tree, mesh),
  )


def compiled_step(config, mesh: Mesh):
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    state = jax.eval_shape(functools.partial(train.init_state, config, VOCAB, optimizer))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model_lib.make_model(config, VOCAB)))
    rows = NamedSharding(mesh, PartitionSpec(sharding.RULES['B']))
    shape = (config.batch_size, config.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    step = functools.partial(train.train_step, config, graphdef, optimizer)
    return jax.jit(step, donate_argnums=0).lower(place(state, mesh), tokens).compile()


@pytest.mark.parametrize('arm', ARMS)
@pytest.mark.parametrize('remat', ['none', 'latents'])
def test_training_runs_cudnns_kernels_and_no_loop(mesh, arm, remat):
  text = compiled_step(config_of(arm, remat=remat), mesh).as_text()
  calls = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
  assert any('Backward' in call for call in calls) and any('Backward' not in call for call in calls)
  # With remat the layers are a loop; attention has none, for its blocks would be a second level.
  assert len(re.findall(r' while\(', text)) <= (0 if remat == 'none' else 2)


@pytest.mark.parametrize('arm', ARMS)
def test_prompts_and_decoding_compile(mesh, arm):
  config = config_of(arm)
  with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: model_lib.make_model(config, VOCAB))
    layers = jax.eval_shape(
      lambda: model_lib.allocate_cache(model, batch=4, slots=256, dtype='bfloat16').layers
    )
    prompts, token = (jax.ShapeDtypeStruct((4, length), jnp.int32) for length in (128, 1))
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    given = place((model, layers, lengths, prompts, token), mesh)

    def both(model, layers, lengths, prompts, token):
      cache = Cache(layers, jnp.zeros(4, jnp.int32))
      logits, cache = model_lib.prefill(model, cache, prompts, lengths)
      return logits, model_lib.decode(model, cache, token)

    text = jax.jit(both, donate_argnums=1).lower(*given).compile().as_text()
  assert '__cudnn$fmha' in text
