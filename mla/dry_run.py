"""What a run needs on a named machine: its training step compiled for it, and nothing run.

Memory is the compiler's own figure. The step's lower bound is the longest of three times: products
at the chip's peak; arguments, results and temporaries through its memory, each byte once in and
once out; and what its links must carry. A real step takes longer than the longest.
"""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mla import backends, cost, flops, hlo, memory, sharding, targets
from mla import config as config_lib
from mla import model as model_lib
from mla.data import tokenizers
from mla.data.pipeline import window_shape
from mla.errors import UserError
from mla.optimizer import make_optimizer
from mla.step import TrainState, init_state, jit_step, train_step
from mla.targets import Target

MFU = 0.4  # what --price counts on where --mfu is not given
LARGEST = 5  # arrays that are named
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# Among a compiled program's custom calls: kernels, and attention's of these.
KERNELS = re.compile(r'tpu_custom_call|__cudnn|__cublas|triton|mla_')
ATTENTION = re.compile(r'tpu_custom_call|fmha|mla_causal')


class Step(NamedTuple):
  """A compiled training step; without what a compiler that ran out of memory does not tell."""

  state: TrainState  # abstract, with shardings
  argument_bytes: int  # a device, as all that follows
  output_bytes: int  # beyond the arguments whose place it takes
  temporary_bytes: int | None
  program: hlo.Program | None
  seconds: float  # of compilation
  peak_bytes: int | None = None  # of what is there at once, where that is what is allocated

  @property
  def need(self) -> int | None:
    """All of them added up."""
    if self.temporary_bytes is None:
      return None
    return self.argument_bytes + self.output_bytes + self.temporary_bytes

  def fits(self, memory: int | None) -> bool:
    """Whether it compiled and there are so many bytes, as far as either is known."""
    known = [amount for amount in (self.need, self.peak_bytes) if amount is not None]
    return self.program is not None and (memory is None or not known or min(known) <= memory)


def answer(
  config: ConfigDict,
  *,
  target: str | None = None,
  context: int | None = None,
  batch: int | None = None,
  fit_batch: bool = False,
  price: float | None = None,
  mfu: float | None = None,
) -> dict[str, Any]:
  """What train.py --dry_run writes as JSON, for its flags; target None is what is there.

  UserError for a target or a config that cannot be compiled for. Must come before JAX's first use.
  """
  config_lib.validate(config)
  if context is not None and context < 1:
    raise UserError(f'--context={context}: must be a positive number of tokens')
  if batch is not None and batch < 1:
    raise UserError(f'--batch={batch}: must be a positive number of conversations')
  found = find(target, price, mfu)
  report = measure(config, found, context=context or config.seq_len, batch=batch or 1)
  if fit_batch:
    report['largest_rows_at_once'] = largest_rows(config, found)
  if price is not None:
    report['run'] = run_costs(report, found, price, MFU if mfu is None else mfu)
  return report


def find(target: str | None, price: float | None, mfu: float | None) -> Target:
  """targets.find, with a UserError for a price that can't be used there."""
  if price is not None and not 0 < price < math.inf:
    raise UserError(f'--price={price}: must be a positive number of dollars')
  if mfu is not None and not 0 < mfu <= 1:
    raise UserError(f'--mfu={mfu}: must be above 0 and at most 1')
  if mfu is not None and price is None:
    raise UserError(f'--mfu={mfu}: goes with --price; give that too, or leave it out')
  found = targets.find(target)
  if price is not None and found.chip.flops is None:
    raise UserError(
      f'--price: the peak of {found.name} is not known; a cost needs an accelerator, such as '
      '--target=v5e:2x4'
    )
  return found


def measure(config: ConfigDict, target: Target, *, context: int, batch: int = 1) -> dict[str, Any]:
  """What the compiler and the traced step say of the config on the target's devices."""
  vocab = memory.vocabulary(config)
  if vocab == 1:
    tokenizers.ready(config.data.tokenizer)  # says what is wrong with it
  mesh = memory.training_mesh(config, target.devices, target.chip.memory)
  sharding.check_batch(config, mesh)
  backends.check(config.attention_impl, mesh)
  model = nnx.eval_shape(lambda: model_lib.make_model(config, vocab))
  step = compile_step(config, vocab, mesh)
  useful, executed = flops_per_token(config, vocab, target.devices[0])
  chip, tokens = target.chip, config.batch_size * config.seq_len

  sent = None if step.program is None else step.program.collective_bytes()
  touched = None
  if step.program and step.temporary_bytes is not None:  # the state is written in its own place
    touched = 2 * (step.argument_bytes + step.temporary_bytes) + step.output_bytes
  seconds = {
    'compute': _over(executed * tokens / mesh.size, chip.flops),
    'memory': _over(touched, chip.bandwidth),
    'links': _over(None if sent is None else sum(sent.values()), chip.links),
  }
  known = {what: time for what, time in seconds.items() if time is not None}
  bound = max(known, key=lambda what: known[what]) if known else None
  need = step.need
  spare = None if need is None or chip.memory is None else chip.memory - need
  kernels = _kernels(step.program) if step.program else []
  total, body = model_lib.count_params(model)
  weights, optimizer = (_bytes_a_device(tree) for tree in (step.state.params, step.state.opt_state))
  cache = cost.cache_bytes(config, vocab, batch=1, context=context, dtype='bfloat16')
  room = None if chip.memory is None else chip.memory - 2 * total
  return {
    'target': target.name,
    'devices': mesh.size,
    'mesh': dict(mesh.shape),
    'fits': step.fits(chip.memory),
    'spare_bytes_per_device': spare,
    'params_total': total,
    'params_non_embedding': body,
    'argument_bytes_per_device': step.argument_bytes,
    'weight_bytes_per_device': weights,
    'optimizer_bytes_per_device': optimizer,
    'whole_weights': sharding.whole_weights(step.state.params, mesh),
    'temporary_bytes_per_device': step.temporary_bytes,
    'peak_bytes_per_device': step.peak_bytes,
    'hbm_bytes_per_device': chip.memory,
    'largest_arrays': [
      {'bytes': nbytes, 'array': array, 'origin': origin}
      for nbytes, array, origin in (step.program.largest(LARGEST) if step.program else [])
    ],
    'flops_per_token': useful,
    'executed_flops_per_token': executed,
    'collective_bytes_per_step': None if sent is None else sum(sent.values()),
    'collectives': sent,
    'seconds_at_least': seconds,
    'step_seconds_at_least': known[bound] if bound else None,
    'bound_by': bound,
    'kernels': kernels,
    'compile_seconds': step.seconds,
    'batch_size': config.batch_size,
    'rows_at_once': config.batch_size // config.accumulation_steps,
    'tokens_per_step': tokens,
    'num_steps': config.num_steps,
    'cache_bytes_per_token': cache / context,
    'context': context,
    'batch': batch,
    'cache_bytes': batch * cache,
    'users_per_device': None if room is None else max(0, room // cache),
  }


def compile_step(config: ConfigDict, vocab: int, mesh: Mesh) -> Step:
  """The step that train.py would run, compiled for the mesh's devices."""
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    abstract = jax.eval_shape(functools.partial(init_state, config, vocab, optimizer))
    placement = sharding.shardings(abstract, mesh)
    state = sharding.placed(abstract, placement)
    rows = sharding.rows_sharding(mesh)
    shapes = [window_shape(config), *([(config.seq_len,)] if config.data.packing else [])]
    batch = [
      jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.int32, sharding=rows)
      for shape in shapes
    ]
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model_lib.make_model(config, vocab)))
    began = time.monotonic()
    lowered = jit_step(config, graphdef, optimizer, placement).lower(state, *batch)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      arguments = _bytes_a_device((state, batch))
      temporary = _refused_bytes(str(error), arguments)
      return Step(state, arguments, 0, temporary, None, time.monotonic() - began)
  used = compiled.memory_analysis()
  # A TPU's compiler accepts and refuses by its peak; its temp_size_in_bytes is half as much again
  # (docs/log.md). CPUs and GPUs get as much as that in one piece.
  tpu = mesh.devices.flat[0].platform == 'tpu'
  return Step(
    state,
    used.argument_size_in_bytes,
    used.output_size_in_bytes - used.alias_size_in_bytes,
    used.temp_size_in_bytes,
    hlo.Program(compiled.as_text()),
    time.monotonic() - began,
    (used.peak_memory_in_bytes or None) if tpu else None,
  )


def flops_per_token(config: ConfigDict, vocab: int, device: jax.Device) -> tuple[float, float]:
  """(flops.worth, what the step computes) of products, as FLOPs a token.

  Computed is also what remat and attention's own backward pass compute again. It is read from the
  traced step, its loops multiplied out; traced for one device, with attention as one block in a
  loop of one turn (backends.counted), so that nothing hides in a kernel and the loops of unknown
  length are attention and nothing else.
  """
  tokens = config.batch_size * config.seq_len
  alone = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, [device])
  optimizer = make_optimizer(config)
  state = jax.eval_shape(functools.partial(init_state, config, vocab, optimizer))
  model = nnx.eval_shape(lambda: model_lib.make_model(config, vocab))
  step = functools.partial(train_step, config, nnx.graphdef(model), optimizer)
  batch = jax.ShapeDtypeStruct((config.batch_size, *window_shape(config)), jnp.int32)
  with jax.set_mesh(alone), backends.counted():
    computed = flops.count(jax.jit(step).trace(state, batch).jaxpr.jaxpr)
    useful = flops.worth(model, config.seq_len)
  return useful, (computed.known + flops.causal(config.seq_len) * computed.turn) / tokens


def _kernels(program: hlo.Program) -> list[str]:
  """The kernels called, attention's first: 'blockwise' where it is XLA's own operations."""
  called = sorted(name for name in program.custom_calls() if KERNELS.search(name))
  attention = [name for name in called if ATTENTION.search(name)]
  return (attention or ['blockwise']) + [name for name in called if name not in attention]


def _bytes_a_device(tree) -> int:
  """Of abstract arrays with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
    for leaf in jax.tree.leaves(tree)
  )


def _itemsize(dtype) -> int:
  return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _refused_bytes(message: str, arguments: int) -> int | None:
  """The temporaries for which a compiler says that memory does not suffice."""
  temporary = re.search(r'HLO temporaries \(([\d.]+)([KMGT])\)', message)
  if temporary:
    return int(float(temporary[1]) * UNITS[temporary[2]])
  used = re.search(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm', message)
  return int(float(used[1]) * UNITS[used[2]]) - arguments if used else None


def _over(amount: int | float | None, rate: float | None) -> float | None:
  return None if amount is None or rate is None else amount / rate


def largest_rows(config: ConfigDict, target: Target, say: Callable[[str], None] = print) -> int:
  """The most rows at once, powers of two times the mesh's rows, that fit; 0 if none do."""
  mesh = memory.training_mesh(config, target.devices, target.chip.memory)
  least = mesh.shape['data'] * mesh.shape['fsdp']
  vocab = memory.vocabulary(config)

  def fits(power: int) -> bool:
    rows = least * 2**power
    changed = config.copy_and_resolve_references()
    changed.update({'batch_size': rows, 'accumulation_steps': 1})
    step = compile_step(changed, vocab, mesh)
    need = step.need or 0
    enough = step.fits(target.chip.memory)
    say(f'{rows} rows at once: {"fit" if enough else "do not fit"} ({_size(need)} a device)')
    return enough

  low, high = -1, 0  # the highest known to fit, the lowest not tried
  while high <= 20 and fits(high):
    low, high = high, 2 * high + 1
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return least * 2**low if low >= 0 else 0


def run_costs(report: dict[str, Any], target: Target, price: float, mfu: float) -> dict[str, Any]:
  """Hours and dollars of the whole run, with a share `mfu` of the peak in useful FLOPs."""
  assert target.chip.flops
  work = report['flops_per_token'] * report['tokens_per_step'] * report['num_steps']
  hours = work / (target.chip.flops * mfu * report['devices']) / 3600
  return {'hours': hours, 'dollars': hours * report['devices'] * price, 'mfu': mfu}


def card(report: dict[str, Any], config: ConfigDict) -> str:
  """The report for the terminal."""
  mesh = ' x '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
  rows = [
    (
      'model',
      f'{config.attention}: {report["params_total"]:,} parameters, '
      f'{report["params_non_embedding"]:,} without embeddings',
    ),
    ('machine', f'{report["target"]}: {report["devices"]} devices, mesh {mesh}'),
    (
      'step',
      f'{report["tokens_per_step"]:,} tokens, {report["rows_at_once"]} of {report["batch_size"]} '
      f'rows at once; compiled in {report["compile_seconds"]:.0f} s',
    ),
    ('fits', _fits(report)),
    (
      'memory',
      f'a device: weights {_size(report["weight_bytes_per_device"])}, optimiser '
      f'{_size(report["optimizer_bytes_per_device"])}, activations and other temporaries '
      f'{_size(report["temporary_bytes_per_device"])}; the largest arrays:',
    ),
  ]
  rows += [
    ('', f'{_size(found["bytes"])} {found["array"]} of {found["origin"]}')
    for found in report['largest_arrays']
  ]
  whole = report['whole_weights']
  if whole:
    named = ', '.join(f'{name} {_size(nbytes)}' for name, nbytes in whole.items())
    rows.append(('whole', f'on every device, as mesh.fsdp divides none of their axes: {named}'))
  rows.append(
    (
      'FLOPs',
      f'{report["flops_per_token"]:.4g} a token; {report["executed_flops_per_token"]:.4g} with '
      'what is computed again',
    )
  )
  if report['collectives'] is not None:
    kinds = ', '.join(f'{kind} {_size(size)}' for kind, size in report['collectives'].items())
    sent = f'{_size(report["collective_bytes_per_step"])} out of each device a step'
    rows.append(('links', f'{sent}: {kinds}' if kinds else sent))
  seconds = report['step_seconds_at_least']
  if seconds is not None:
    parts = ', '.join(
      f'{what} {time:.3g} s' for what, time in report['seconds_at_least'].items() if time
    )
    rows.append(
      (
        'time',
        f'at least {seconds:.3g} s a step, bound by {report["bound_by"]} ({parts}); at most '
        f'{report["tokens_per_step"] / seconds:,.0f} tokens/s',
      )
    )
  if report['kernels']:
    rows.append(('kernels', ', '.join(report['kernels'])))
  cache = (
    f'{report["cache_bytes_per_token"]:,.0f} bytes a token in bfloat16, '
    f'{_size(report["cache_bytes"])} of {report["batch"]:,} x {report["context"]:,} tokens'
  )
  if report['users_per_device'] is not None:
    cache += (
      f'; beside the weights in bfloat16 a device holds {report["users_per_device"]:,} users of '
      f'{report["context"]:,} tokens'
    )
  rows.append(('cache', cache))
  if 'largest_rows_at_once' in report:
    rows.append(('batch', f'at most {report["largest_rows_at_once"]} rows at once fit'))
  if 'run' in report:
    run = report['run']
    rows.append(
      (
        'run',
        f'{report["num_steps"]:,} steps: {run["hours"]:,.1f} hours and {run["dollars"]:,.2f} '
        f'dollars, at {run["mfu"]:.0%} of the peak',
      )
    )
  return '\n'.join(f'{name:9}{text}' for name, text in rows)


def _fits(report: dict[str, Any]) -> str:
  there, spare = report['hbm_bytes_per_device'], report['spare_bytes_per_device']
  peak = report['peak_bytes_per_device']
  at_once = '' if peak is None else f', {_size(peak)} of them at once'
  if spare is None:
    return 'yes, as far as is known' if report['fits'] else 'no: the compiler ran out of memory'
  if spare < 0 and report['fits']:
    return f'yes: {_size(peak)} of {_size(there)} a device at once, {_size(there - spare)} added up'
  if spare < 0:
    return f'no: {_size(-spare)} more than the {_size(there)} that a device has'
  return f'yes: {_size(there - spare)} of {_size(there)} a device{at_once}'


def _size(nbytes: int | float | None) -> str:
  if nbytes is None:
    return 'unknown'
  return f'{nbytes / 2**30:.2f} GiB' if nbytes >= 2**24 else f'{nbytes / 2**20:.2f} MiB'
