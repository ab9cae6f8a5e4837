"""Trains one model: config in, checkpoints and metrics out. Knows nothing of sweeps."""

import contextlib
import enum
import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from mla import backends, flops, hosts, memory, probes, sharding, targets, terminal
from mla import config as config_lib
from mla import model as model_lib
from mla.checkpoint import Checkpoints
from mla.data import tokenizers
from mla.data.pipeline import Data, EvalWindows, eval_windows, load_data, skip_to, train_batches
from mla.errors import Diverged
from mla.init_from import settle, weights
from mla.metrics import Metrics, NoMetrics, Wandb
from mla.optimizer import make_optimizer, make_schedule
from mla.profile import Trace
from mla.signals import CAUGHT, Stopped, StopSignal
from mla.step import TrainState, eval_step, init_state, jit_step
from mla.workdir import check_workdir, claim_workdir, lease_workdir

SAMPLE_PROMPT, SAMPLE_TOKENS = 'The ', 128


class Ending(enum.Enum):
  """How a run ended; false if a signal ended it early, with everything saved."""

  COMPLETE = 0
  SIGTERM = int(signal.SIGTERM)
  CTRL_C = int(signal.SIGINT)

  def __bool__(self) -> bool:
    return self is Ending.COMPLETE


def train_and_evaluate(
  config: ConfigDict,
  workdir: Path,
  report: Callable[[int, dict], None] | None = None,
  init_from: Path | None = None,
  *,
  profile: int = 0,
  project: str = '',
) -> Ending:
  """Trains to config.num_steps, going on from workdir's newest checkpoint if it has one.

  Over several processes (hosts.join), each calls this with the same arguments and a workdir that
  all see; the first writes the metrics.

  A new run starts with the weights of the run in the folder init_from, if one is given. Calls
  report(step, evaluation) after each evaluation; traces `profile` steps (mla/profile.py); and
  repeats the metrics in the Weights & Biases project of that name, if any. Holds the workdir's
  lease. Raises UserError for what the user can mend, another process that trains there among it;
  MachineError where space, handles or memory ran out; and Diverged when the loss is no longer
  finite. All of these keep the last good checkpoint.
  """
  with contextlib.ExitStack() as until_the_end:
    return _train(
      config, workdir, report, until_the_end, lease_workdir, init_from, profile, project
    )


def train_leased(config: ConfigDict, workdir: Path) -> Ending:
  """train_and_evaluate for one whose caller, here or elsewhere, holds the workdir's lease."""
  with contextlib.ExitStack() as until_the_end:
    return _train(config, workdir, None, until_the_end, contextlib.nullcontext)


def _train(
  config: ConfigDict,
  workdir: Path,
  report: Callable[[int, dict], None] | None,
  until_the_end: contextlib.ExitStack,
  lease: Callable[[Path], contextlib.AbstractContextManager],
  init_from: Path | None = None,
  profile: int = 0,
  project: str = '',
) -> Ending:
  config_lib.validate(config)
  stop = StopSignal()  # from here on, so that none is lost
  until_the_end.callback(stop.restore)
  # What the run is.
  mesh = memory.training_mesh(config)
  sharding.check_batch(config, mesh)
  backends.check(config.attention_impl, mesh)
  memory.check_training(config, mesh)
  hosts.first_decides(lambda: check_workdir(config, workdir))  # before minutes go into its text
  if hosts.is_first():
    print('preparing the text', flush=True)
  try:
    data = load_data(config, lambda: stop.requested != 0)
  except Stopped:
    print('stopped while the tokens were prepared; run the same command again to go on')
    return Ending(stop.requested)
  hosts.check_same('data.*: text and tokenizer', data.digest)
  model = nnx.eval_shape(lambda: model_lib.make_model(config, data.tokenizer.vocab_size))
  chip = targets.chip(mesh.devices.flat[0].device_kind)
  worth = flops.worth(model, config.seq_len) if chip else 0.0
  batches = train_batches(
    data.train,
    seq_len=config.seq_len,
    batch_size=config.batch_size,
    seed=config.seed,
    rows=sharding.rows_here(config.batch_size, mesh),
  )
  windows = eval_windows(
    data.validation, seq_len=config.seq_len, max_tokens=config.data.eval_tokens
  )
  _claim_together(config, workdir, until_the_end, lease)

  with jax.set_mesh(mesh):
    # Where it stands.
    optimizer = make_optimizer(config)
    create = functools.partial(init_state, config, data.tokenizer.vocab_size, optimizer)
    abstract = jax.eval_shape(create)
    placement = sharding.shardings(abstract, mesh)
    checkpoints = until_the_end.enter_context(Checkpoints(workdir, config.checkpoints_kept))
    checkpoints.open()
    run = {
      'config': config_lib.to_json(config),
      'data': data.digest,
      'tokenizer': data.tokenizer.digest,
    }
    begun = bool(checkpoints.steps())
    source = hosts.first_decides(lambda: settle(workdir, init_from, begun=begun))
    state, start = _restore(checkpoints, abstract, placement, batches, run)
    if start >= config.num_steps:
      if hosts.is_first():
        done = f'{workdir}: already trained to step {start} of {config.num_steps}; nothing to do.'
        more = f'--init_from={workdir} --workdir=DIR'
        print(terminal.fit(f'{done} To train its weights on, start a new run from them: {more}'))
      return Ending.COMPLETE
    origin = f'from step {start}'
    if state is None:
      state, origin = jax.jit(create, out_shardings=placement)(), 'from scratch'
      if source is not None:
        target = sharding.placed(abstract, placement).params
        there, params = weights(Path(source), config, data.tokenizer.digest, target)
        state, origin = state._replace(params=params), f'with the weights of {source}, step {there}'

    metrics: Metrics | NoMetrics = NoMetrics()
    if hosts.is_first():
      if not isinstance(data.tokenizer, probes.Symbols):
        tokenizers.save(data.tokenizer, workdir)
      logger = Wandb(project, workdir, config.to_dict()) if project else None
      metrics = until_the_end.enter_context(
        Metrics(workdir, start=start, total=config.num_steps, wandb=logger)
      )
    metrics.say(describe(config, model, data, mesh, origin))

    # The compiled parts.
    graphdef = nnx.graphdef(model)
    put = functools.partial(sharding.put_batches, mesh=mesh, size=config.batch_size)
    metrics.doing('compiling the training step')
    began = time.monotonic()
    batch = put(next(batches))
    jitted = jit_step(config, graphdef, optimizer, placement)
    step_fn = jitted.lower(state, *batch).compile()
    metrics.say(f'compiled the training step in {time.monotonic() - began:.1f} s')
    metrics.doing('the first step')
    eval_fn = jax.jit(functools.partial(eval_step, graphdef))
    sample = make_sampler(config, graphdef, data.tokenizer, mesh)
    schedule = make_schedule(config)
    trace = Trace(workdir / 'tensorboard', start, profile if hosts.is_first() else 0)
    until_the_end.callback(trace.close)

    # The loop. The host only waits for the devices where a number is asked for. A checkpoint comes
    # after what its step reports, so that a run killed at any time has it all when it goes on.
    since, since_step = time.monotonic(), start
    for step in range(start + 1, config.num_steps + 1):
      with trace.step(step):
        state, measured = step_fn(state, *batch)
      metrics.step(measured['loss'].is_ready)
      if trace.begun(step, measured):
        metrics.say(f'steps {trace.first} to {step} are traced: tensorboard --logdir={workdir}')
      last = step == config.num_steps
      log = last or step == start + 1 or step % config.log_every == 0
      evaluating = last or step % config.eval_every == 0
      save = last or step % config.checkpoint_every == 0
      stopping = 0
      if jax.process_count() == 1 or log or evaluating or save:  # they have to agree on the step
        stopping = hosts.largest(stop.requested)
      save = save or stopping != 0
      if not save:
        batch = put(next(batches))
      if log or evaluating or save:
        _check_finite(measured, step, checkpoints)
        checkpoints.check()
      if log:
        now = time.monotonic()
        tokens = (step - since_step) * config.batch_size * config.seq_len
        values = {name: float(value) for name, value in measured.items()}
        values['learning_rate'] = float(schedule(step - 1))
        values['tokens_per_second'] = tokens / (now - since)
        values['tokens_seen'] = step * config.batch_size * config.seq_len
        if chip and chip.flops:  # the share of the bfloat16 peak in useful FLOPs: flops.worth
          values['mfu'] = worth * values['tokens_per_second'] / (chip.flops * mesh.size)
        metrics.write(step, values)
        metrics.progress(step, values)
        since, since_step = now, step
      if evaluating:
        evaluation = evaluate(eval_fn, state.params, windows, data, config, mesh)
        _check_finite(evaluation, step, checkpoints)
        metrics.write(step, evaluation)
        said = f'step {step}  eval loss {evaluation["eval_loss"]:.4f}'
        if sample is None:
          metrics.say(f'{said}  accuracy {evaluation["eval_accuracy"]:.4f}')
        else:
          text = sample(state)
          metrics.write_text(step, 'sample', text)
          bits = evaluation['eval_bits_per_byte']
          metrics.say(f'{said}  {bits:.4f} bits per byte; it writes:\n{terminal.quoted(text)}')
        if report is not None:
          report(step, evaluation)
        since, since_step = time.monotonic(), step
      if save:  # the position saved is that of the next step's batch
        training = (state.opt_state, state.step, jax.random.key_data(state.key))
        checkpoints.save(step, state.params, training, {**run, 'batches': step})
        if stopping or last:
          break
        batch = put(next(batches))

  checkpoints.close()
  if stopping and not last:
    metrics.say(
      f'stopped by {CAUGHT[signal.Signals(stopping)]} at step {step}, saved; run the same command '
      'again to go on'
    )
    return Ending(stopping)
  return Ending.COMPLETE


def evaluate(
  eval_fn, params, windows: EvalWindows, data: Data, config: ConfigDict, mesh
) -> dict[str, float]:
  """Loss (nats a token) and bits per byte over the windows, without a cache (eval.py reads one).

  Of a probe accuracy takes the place of bits per byte.
  """
  nll, count, right = 0.0, 0, 0
  size = config.batch_size // config.accumulation_steps  # what training has memory for
  here = sharding.rows_here(size, mesh)
  for start in range(0, len(windows.tokens), size):
    batch = windows.take(start + here)
    part = eval_fn(params, *sharding.put_batches(batch, mesh, size))
    nll, count = nll + float(part['nll']), count + int(part['targets'])
    right += int(part.get('right', 0))
  if isinstance(data.tokenizer, probes.Symbols):
    return {'eval_loss': nll / count, 'eval_accuracy': right / count}
  text = int(np.sum(data.tokenizer.byte_lengths[windows.tokens[:, 1:]] * windows.mask))
  return {'eval_loss': nll / count, 'eval_bits_per_byte': nll / (math.log(2) * text)}


def make_sampler(
  config: ConfigDict, graphdef, tokenizer: tokenizers.Tokenizer | probes.Symbols, mesh
) -> Callable[[TrainState], str] | None:
  """What makes text of a state of training; None for a probe, which has none."""
  if isinstance(tokenizer, probes.Symbols):
    return None
  sample_fn = jax.jit(
    functools.partial(sample_text, config, graphdef), out_shardings=sharding.everywhere(mesh)
  )
  prompt = np.array([[tokenizer.bos, *tokenizer.encode(SAMPLE_PROMPT)]], np.int32)

  def sample(state: TrainState) -> str:
    sampled = sample_fn(state.params, jax.random.fold_in(state.key, state.step), prompt)
    return SAMPLE_PROMPT + tokenizer.decode(np.asarray(sampled[0]))

  return sample


def sample_text(
  config: ConfigDict, graphdef, params, key: Key[Array, ''], prompt: Int[Array, '1 T']
) -> Int[Array, '1 steps']:
  """A continuation of a prompt by SAMPLE_TOKENS, decoded through a cache in the run's dtype."""
  model = nnx.merge(graphdef, params)
  cache = model_lib.allocate_cache(
    model, batch=1, slots=prompt.shape[1] + SAMPLE_TOKENS, dtype=config.dtype
  )
  lengths = jnp.array([prompt.shape[1]], jnp.int32)
  tokens, _ = model_lib.generate(
    model, cache, prompt, lengths, key, steps=SAMPLE_TOKENS, temperature=0.8, top_p=0.95
  )
  return tokens


def describe(config: ConfigDict, model: model_lib.Decoder, data: Data, mesh, origin: str) -> str:
  """What is about to be trained, for the terminal."""
  total, body = model_lib.count_params(model)
  cache = model_lib.allocate_cache(model, batch=1, slots=1, dtype='bfloat16')
  devices = ' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  whole = sharding.whole_weights(nnx.state(model, nnx.Param), mesh)
  named = ', '.join(f'{name} {nbytes:,} bytes' for name, nbytes in whole.items())
  amount = data.train.amount()
  lines = [
    f'{config.attention}: {total:,} parameters, {body:,} without embeddings; '
    f'{cache.bytes_per_token():,.0f} bytes of KV cache a token in bfloat16',
    f'{amount}; {config.num_steps} steps of '
    f'{config.batch_size * config.seq_len:,}; {jax.default_backend()} mesh {devices}; {origin}',
  ]
  if whole:
    lines.insert(0, f'whole on every device, as mesh.fsdp divides none of their axes: {named}')
  if config.mesh.fsdp == 0 and mesh.shape['fsdp'] > 1:
    lines.insert(
      0,
      f'mesh.fsdp=0: {mesh.shape["fsdp"]} devices share weights and optimiser, which would leave '
      'too little memory on one',
    )
  return '\n'.join(lines)


def _claim_together(
  config: ConfigDict,
  workdir: Path,
  until_the_end: contextlib.ExitStack,
  lease: Callable[[Path], contextlib.AbstractContextManager],
) -> None:
  """claim_workdir under its lease, by the first process before the others look."""

  def claim() -> None:
    check_workdir(config, workdir)  # a folder that is not ours gets no lock either
    until_the_end.enter_context(lease(workdir))
    claim_workdir(config, workdir)

  hosts.first_decides(claim)
  if not hosts.is_first():
    claim_workdir(config, workdir)


def _restore(checkpoints, abstract, placement, batches, run: dict):
  """(state, step) of the newest whole checkpoint, or (None, 0)."""
  target = sharding.placed(abstract, placement)
  key_data = jax.eval_shape(jax.random.key_data, abstract.key)
  key_data = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=placement.key)
  training = (target.opt_state, target.step, key_data)
  found = checkpoints.restore(target.params, training, run)
  if found is None:
    return None, 0
  skip_to(batches, found.batches)
  opt_state, count, key = found.training
  key = jax.random.wrap_key_data(key, impl=model_lib.PRNG)
  return TrainState(found.params, opt_state, count, key), found.step


def _check_finite(
  measured: Mapping[str, Array | float], step: int, checkpoints: Checkpoints
) -> None:
  if all(math.isfinite(float(value)) for value in measured.values()):
    return
  checkpoints.close()
  good = checkpoints.steps()
  raise Diverged(
    f'the loss is no longer finite at step {step}; '
    + (f'the checkpoint of step {good[-1]} is kept. ' if good else 'no checkpoint yet. ')
    + 'Try a lower learning_rate, a longer warmup_steps or a smaller grad_clip in a new workdir'
  )
