"""One training step, as it is compiled: the state, the loss, the update on a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from mla import loss as loss_lib
from mla import model as model_lib
from mla import windows as windows_lib
from mla.attention import nested
from mla.backends import Starts
from mla.layers import project


class TrainState(NamedTuple):
  params: Any  # nnx.State of Params
  opt_state: Any
  step: Int[Array, '']
  key: Key[Array, '']  # for sampling text, and the widths of nested latents


def init_state(config: ConfigDict, vocab: int, optimizer) -> TrainState:
  """Step 0: fresh parameters and optimiser state."""
  params = nnx.state(model_lib.make_model(config, vocab), nnx.Param)
  key = jax.random.key(config.seed, impl=model_lib.PRNG)
  return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def jit_step(config: ConfigDict, graphdef, optimizer, placement: TrainState):
  """train_step as it is compiled: the state donated, and left where it lay."""
  return jax.jit(
    functools.partial(train_step, config, graphdef, optimizer),
    donate_argnums=0,
    out_shardings=(placement, None),
  )


def train_step(
  config: ConfigDict,
  graphdef,
  optimizer,
  state: TrainState,
  tokens: Int[Array, 'B window *row'],
  starts: Starts = None,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """One update on a batch: the mean gradient over accumulation_steps micro-batches."""

  def loss_fn(params, batch):
    return mean_nll(nnx.merge(graphdef, params), *batch)

  batch = (tokens, _draw_widths(config, state, len(tokens)), starts)
  loss_and_grads = jax.value_and_grad(loss_fn)
  if config.accumulation_steps == 1:
    loss, grads = loss_and_grads(state.params, batch)
  else:
    loss, grads = accumulate(loss_and_grads, config.accumulation_steps, state.params, batch)
  with jax.numpy_dtype_promotion('standard'):  # which optax counts on
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  measured = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
  return TrainState(params, opt_state, state.step + 1, state.key), measured


def _draw_widths(config: ConfigDict, state: TrainState, rows: int) -> Int[Array, 'B L'] | None:
  """To which this step cuts each row's latents, in each layer; None where none are nested."""
  widths = nested.widths_of(config)
  if not widths:
    return None
  drawn = nested.draw_widths(widths, state.key, state.step, rows)
  return jnp.broadcast_to(drawn[:, None], (rows, config.num_layers))


def accumulate(loss_and_grads, steps: int, params, batch):
  """The mean of loss_and_grads(params, micro-batch) over `steps` micro-batches.

  batch is a tree of arrays whose first axis is the rows. Every device adds up those of its own
  rows, and along data the sums are exchanged once, at the end. Along fsdp that is done for each
  micro-batch, or each device would hold the whole gradient; with tensor along data too, for XLA's
  partitioner fails where it has that and fsdp to itself.
  """

  def local(params, batch):
    # Every micro-batch takes rows from each device's part of the batch, so none is moved.
    def split(x):
      return x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)

    def micro_step(total, batch):
      return jax.tree.map(jnp.add, total, loss_and_grads(params, batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), params))
    total, _ = jax.lax.scan(micro_step, zeros, jax.tree.map(split, batch))
    return jax.tree.map(lambda part: part / steps, total)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape['data'] == 1 or mesh.shape['tensor'] > 1:
    return local(params, batch)

  def on_a_replica(params, batch):
    return jax.lax.pmean(local(params, batch), 'data')

  return jax.shard_map(
    on_a_replica,
    in_specs=(PartitionSpec(), PartitionSpec('data')),
    out_specs=PartitionSpec(),
    axis_names={'data'},
    check_vma=False,
  )(params, batch)


def mean_nll(
  model: model_lib.Decoder,
  tokens: Int[Array, 'B window *row'],
  widths: Int[Array, 'B L'] | None = None,
  starts: Starts = None,
) -> Float[Array, '']:
  """The mean negative log-likelihood of the targets in nats, all positions in parallel."""
  inputs, targets = windows_lib.inputs_and_targets(tokens)
  x = model_lib.states(model, inputs, widths, starts)
  text = windows_lib.are_text(tokens)
  mean = loss_lib.mean_nll if text else loss_lib.mean_scored_nll
  return mean(x, model.unembedding(), targets, model.vocab)


def eval_step(
  graphdef,
  params,
  tokens: Int[Array, 'B window *row'],
  mask: Bool[Array, 'B T'],
  starts: Starts = None,
) -> dict[str, Array]:
  """Of the targets in the mask: `nll`, their sum in nats, and their number; of probes `right`."""
  model = nnx.merge(graphdef, params)
  inputs, targets = windows_lib.inputs_and_targets(tokens)
  x = model_lib.states(model, inputs, starts=starts)
  found = {'targets': jnp.sum(mask, dtype=jnp.int32)}
  if not windows_lib.are_text(tokens):
    guesses = jnp.argmax(
      loss_lib.only_tokens(project(x, model.unembedding()), model.vocab), axis=-1
    )
    found['right'] = jnp.sum(guesses == targets, where=mask, dtype=jnp.int32)
    targets = jnp.maximum(targets, 0)
  nll = loss_lib.token_nll(x, model.unembedding(), targets, model.vocab)
  return {'nll': jnp.sum(nll, where=mask), **found}
