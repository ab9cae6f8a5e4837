"""What an arm costs, from the compiled program and the allocated arrays rather than from formulas.

Nothing here trains or draws weights: programs are compiled for abstract arrays on one device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mla import backends, loss
from mla import model as model_lib
from mla.data.pipeline import window_shape
from mla.optimizer import make_optimizer
from mla.step import init_state, mean_nll, train_step


def training_costs(config: ConfigDict, vocab: int) -> dict[str, Any]:
  """What the report needs of an arm: FLOPs a token, and memory with and without kept latents."""
  return {
    'flops_per_token': train_flops_per_token(config, vocab),
    'training_memory': {
      remat: {
        'peak_bytes': train_peak_bytes(config, vocab, remat),
        'activation_bytes': activation_bytes(config, vocab, remat),
      }
      for remat in ('none', 'latents')
    },
  }


def train_flops_per_token(config: ConfigDict, vocab: int) -> float:
  """XLA's count of a training step's floating-point operations over its tokens.

  XLA counts a loop's body once. So the step is compiled with attention as one block over the whole
  T x T square, its scores kept for the backward pass (the causal blocks that run skip up to half of
  the square, but compute scores twice), and with one and two layers, of which the second's cost is
  taken num_layers - 1 times. What remat computes again is not counted.
  """

  def flops(layers: int) -> float:
    with backends.counted(), loss.whole():
      compiled = _compile_step(
        _copy(config, num_layers=layers, remat='none', accumulation_steps=1), vocab
      )
    return compiled.cost_analysis()['flops']

  one = flops(1)
  total = one + (config.num_layers - 1) * (flops(2) - one)
  return total / (config.batch_size * config.seq_len)


def train_peak_bytes(config: ConfigDict, vocab: int, remat: str) -> int:
  """The training step's arguments (weights, optimiser, batch) and working memory, as compiled.

  On a CPU attention's C++ part takes more, which XLA does not see: in the backward pass some
  4 T (3 (N + R) + 2 V) bytes a core, a quarter of a MB in the small configs.
  """
  memory = _compile_step(_copy(config, remat=remat), vocab).memory_analysis()
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def activation_bytes(config: ConfigDict, vocab: int, remat: str) -> int:
  """Bytes that the forward pass of one batch keeps for the backward pass, weights aside.

  The sizes of what jax.vjp's function closes over, before XLA's fusion drops or merges any of it.
  """
  config = _copy(config, remat=remat)
  graphdef, params = nnx.split(_abstract_model(config, vocab))

  def residuals(params, tokens):
    def mean(params):
      return mean_nll(nnx.merge(graphdef, params), tokens)

    return jax.vjp(mean, params)[1]

  kept = jax.eval_shape(residuals, params, _abstract_batch(config))
  weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(kept)
    if (leaf.shape, leaf.dtype) not in weights
  )


def cache_bytes(config: ConfigDict, vocab: int, *, batch: int, context: int, dtype: str) -> int:
  """Bytes of the cache that `batch` conversations of `context` tokens need, from its arrays."""
  model = _abstract_model(config, vocab)
  layers = jax.eval_shape(
    lambda: model_lib.allocate_cache(model, batch=batch, slots=context, dtype=dtype).layers
  )
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))


def cache_parts(config: ConfigDict, vocab: int, *, dtype: str) -> dict[str, int]:
  """{what the variant keeps: bytes of it a token}, in all layers, from the cache's arrays."""
  model = _abstract_model(config, vocab)
  layers = jax.eval_shape(
    lambda: model_lib.allocate_cache(model, batch=1, slots=1, dtype=dtype).layers
  )
  return {
    name: sum(
      leaf.size * leaf.dtype.itemsize for layer in layers for leaf in jax.tree.leaves(layer[name])
    )
    for name in layers[0]
  }


def flops_parts(config: ConfigDict, vocab: int, total: float) -> dict[str, float]:
  """{part: FLOPs a token} of a training step of `total` (train_flops_per_token's) in all.

  A weight costs 6 a token: 2 in the forward, 4 in the backward pass. What no weight explains is the
  products of queries, keys and values, and the elementwise work.
  """
  weights = {'feed-forward': 0, 'projections': 0, 'unembedding': 0}
  where = {'ffn': 'feed-forward', 'attention': 'projections', 'w_out': 'unembedding'}
  if config.tie_embeddings:
    where['embedding'] = 'unembedding'
  for path, leaf in nnx.to_flat_state(nnx.state(_abstract_model(_copy(config), vocab))):
    if str(path[-1]).startswith('w_') or path[-1] in where:
      weights[next(where[name] for name in path if name in where)] += leaf.size
  parts = {part: 6.0 * size for part, size in weights.items()}
  return {**parts, 'scores and the rest': total - sum(parts.values())}


def _compile_step(config: ConfigDict, vocab: int):
  optimizer = make_optimizer(config)
  state = jax.eval_shape(functools.partial(init_state, config, vocab, optimizer))
  step = functools.partial(
    train_step, config, nnx.graphdef(_abstract_model(config, vocab)), optimizer
  )
  return jax.jit(step, donate_argnums=0).lower(state, _abstract_batch(config)).compile()


def _abstract_model(config: ConfigDict, vocab: int) -> model_lib.Decoder:
  return nnx.eval_shape(lambda: model_lib.make_model(config, vocab))


def _abstract_batch(config: ConfigDict) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((config.batch_size, *window_shape(config)), jnp.int32)


def _copy(config: ConfigDict, **changes) -> ConfigDict:
  """The config with its feed-forward width solved, so that changes leave it as it is."""
  copy = config.copy_and_resolve_references()
  copy.ffn_dim = config.ffn_dim or model_lib.solve_ffn_dim(config)
  copy.update(changes)
  return copy
