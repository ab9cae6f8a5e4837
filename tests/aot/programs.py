"""The programs that training and decoding run, compiled for a mesh of machines that aren't here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import base
from mla import cache as cache_lib
from mla import evaluate, sharding
from mla import model as model_lib
from mla import step as step_lib
from mla.cache import Cache
from mla.optimizer import make_optimizer

VOCAB = 512
SMALL = {
  'num_layers': 2,
  'd_model': 64,
  'num_heads': 4,
  'head_dim': 32,
  'ffn_dim': 128,
  'seq_len': 256,
  'batch_size': 8,
  'dtype': 'bfloat16',
}
ARMS = {
  'mha': {'attention': 'mha'},
  'gqa': {'attention': 'gqa', 'num_kv_heads': 2},
  'mqa': {'attention': 'mqa'},
  'mla': {'attention': 'mla', 'latent_dim': 32, 'rope_dim': 16},
}


def mesh_of(devices, sizes: tuple[int, int, int]) -> Mesh:
  return Mesh(
    np.array(devices).reshape(sizes), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3
  )


def config_of(arm: str, **changes):
  config = base.get_config()
  config.update({**SMALL, **ARMS[arm], **changes})
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
    state = jax.eval_shape(functools.partial(step_lib.init_state, config, VOCAB, optimizer))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model_lib.make_model(config, VOCAB)))
    rows = NamedSharding(mesh, PartitionSpec(sharding.RULES['B']))
    widths = [config.seq_len + 1, *([config.seq_len] if config.data.packing else [])]
    batch = [
      jax.ShapeDtypeStruct((config.batch_size, width), jnp.int32, sharding=rows) for width in widths
    ]
    step = functools.partial(step_lib.train_step, config, graphdef, optimizer)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(sharding.shardings(state, mesh), None))
    return jitted.lower(place(state, mesh), *batch).compile()


def compiled_generation(config, mesh: Mesh):
  """A prompt of half the cache read, and a token decoded."""
  with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: model_lib.make_model(config, VOCAB))
    layers = jax.eval_shape(
      lambda: model_lib.allocate_cache(model, batch=8, slots=256, dtype='bfloat16').layers
    )
    prompts, token = (jax.ShapeDtypeStruct((8, length), jnp.int32) for length in (128, 1))
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    given = place((model, layers, lengths, prompts, token), mesh)

    def both(model, layers, lengths, prompts, token):
      cache = Cache(layers, jnp.zeros(8, jnp.int32))
      logits, cache = model_lib.prefill(model, cache, prompts, lengths)
      return logits, model_lib.decode(model, cache, token)

    return jax.jit(both, donate_argnums=1).lower(*given).compile()


def compiled_reading(config, mesh: Mesh, batch: int):
  """Windows read through their cache, four chunks each."""
  with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: model_lib.make_model(config, VOCAB))
    graphdef, params = nnx.split(model)
    layers = jax.eval_shape(
      lambda: model_lib.allocate_cache(model, batch=batch, slots=256, dtype='bfloat16').layers
    )
    where = cache_lib.shardings(layers, batch, mesh)
    split = batch % (mesh.shape['data'] * mesh.shape['fsdp']) == 0
    rows = sharding.rows_sharding(mesh) if split else sharding.everywhere(mesh)
    tokens = jax.ShapeDtypeStruct((batch, 257), jnp.int32, sharding=rows)
    given = place(params, mesh), sharding.placed(layers, where), tokens
    return evaluate.make_score(graphdef, mesh, where, 64).lower(*given).compile()
