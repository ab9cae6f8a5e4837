"""Whether a run can fit: what it needs at the least, from abstract shapes, and what there is.

Nothing is allocated and no step is traced. The need is a lower bound, as no run that fits may be
refused: arrays that any schedule of the program has to hold at once. Its true peak is higher;
XLA's own count of it is cost.train_peak_bytes.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from mla import loss, probes, sharding
from mla import model as model_lib
from mla.data import tokenizers
from mla.errors import UserError

# Axis letter -> the field that sets its size.
SIZES = {
  'L': 'num_layers',
  'D': 'd_model',
  'F': 'ffn_dim',
  'H': 'num_heads',
  'N': 'head_dim',
  'V': 'value_head_dim',
  'C': 'latent_dim',
  'R': 'rope_dim',
  'Q': 'query_latent_dim',
  'vocab': 'data.tokenizer',
  'B': 'batch_size',
  'T': 'seq_len',
}
ALIKE = 0.9  # shares of the need that count as the same
UNKNOWN = 10**30  # bytes there are, where nothing says how many
# Of a device's memory, what the needs may take where mesh.fsdp=0 chooses: they are the least, and
# the activations that they don't count take as much again or more.
SHARE = 0.5


class Need(NamedTuple):
  """Some arrays that are held at once."""

  what: str
  axes: tuple[str, ...]  # the letters of their sizes
  shape: tuple[int, ...]
  nbytes: int  # on one device


def training_mesh(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None, there: int | None = None
) -> Mesh:
  """The mesh that config.mesh asks for, mesh.fsdp=0 resolved by training's needs.

  Over `devices` of `there` bytes each; those of this machine if not given.
  """
  return _mesh(config.mesh.to_dict(), lambda m: training_needs(config, m), devices, there)


def reading_mesh(config: ConfigDict, cache_dtype: str, *, batch: int, chunk: int) -> Mesh:
  """The mesh on which `batch` windows are read through their cache, whatever trained the weights:
  weights are whole on each device if that leaves room."""
  sizes = {'data': -1, 'fsdp': 0, 'tensor': 1}
  return _mesh(sizes, lambda m: reading_needs(config, cache_dtype, m, batch, chunk))


def _mesh(
  sizes: dict[str, int],
  needs: Callable[[Mesh], list[Need]],
  devices: Sequence[jax.Device] | None = None,
  there: int | None = None,
) -> Mesh:
  """sharding.make_mesh. fsdp=0 is 1, but beside data=-1 the fewest devices, of those that divide
  what is left, at which the needs take at most SHARE of a device's memory; all of them where none
  are enough. On CPUs, which share their memory, and where nothing says how much there is, it is 1.
  """
  mesh = sharding.make_mesh(sizes, devices)
  if sizes['fsdp'] or sizes['data'] != -1 or _is_cpu(mesh):
    return mesh
  room = SHARE * (there or _limit(mesh))
  for fsdp in range(1, mesh.size + 1):
    if mesh.shape['data'] * mesh.shape['fsdp'] % fsdp == 0:
      mesh = sharding.make_mesh({**sizes, 'fsdp': fsdp}, devices)
      if sum(need.nbytes for need in needs(mesh)) <= room:
        break
  return mesh


def _limit(mesh: Mesh) -> int:
  """Bytes of memory that a program may have on each of an accelerator's devices."""
  return (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit', UNKNOWN)


def check_training(config: ConfigDict, mesh: Mesh) -> None:
  """Raises UserError, naming the field to lower, if training cannot fit on the mesh's devices."""
  _check('training', training_needs(config, mesh), config, mesh)


def check_reading(
  config: ConfigDict, cache_dtype: str, mesh: Mesh, *, batch: int, chunk: int
) -> None:
  """The same for reading `batch` windows through their cache, `chunk` tokens at a time."""
  _check('evaluation', reading_needs(config, cache_dtype, mesh, batch, chunk), config, mesh)


def training_needs(config: ConfigDict, mesh: Mesh) -> list[Need]:
  """Of a step: weights, their gradients (clipping needs all of them) and Adam's two moments; what
  the backward pass reads of the forward pass; the logits."""
  model = _abstract_model(config)
  needs = []
  for axes, shape in _weights(model):
    part = NamedSharding(mesh, sharding.weight_spec(axes, shape, mesh)).shard_shape(shape)
    held = 4 * 4 * math.prod(part)  # float32, all four
    needs.append(Need('parameters, gradients and moments', axes, shape, held))
  itemsize = jax.numpy.dtype(config.dtype).itemsize
  sizes = {
    'L': config.num_layers,
    'B': config.batch_size // config.accumulation_steps,
    'T': config.seq_len,
    'D': config.d_model,
    'F': model.blocks.ffn.w_gate.shape[-1],
    'vocab': vocabulary(config),
  }
  kept = [('activations', ('L', 'B', 'T', 'D'))]
  if config.remat == 'none' and _is_cpu(mesh):  # other backends may compute these again
    kept.append(('activations', ('L', 'B', 'T', 'F')))
  for what, axes in kept:
    shape = tuple(sizes[letter] for letter in axes)
    needs.append(Need(what, axes, shape, itemsize * math.prod(shape) // mesh.size))
  axes = ('B', 'T', 'vocab')
  shape = tuple(sizes[letter] for letter in axes)
  logits = min(itemsize * math.prod(shape) // mesh.size, loss.CHUNK_BYTES // 2)  # of a chunk
  needs.append(Need('logits', axes, shape, logits))
  return needs


def reading_needs(
  config: ConfigDict, cache_dtype: str, mesh: Mesh, batch: int, chunk: int
) -> list[Need]:
  """Of evaluation: the weights, the cache, and a chunk's logits."""
  model = _abstract_model(config)
  needs = []
  for axes, shape in _weights(model):
    part = NamedSharding(mesh, sharding.weight_spec(axes, shape, mesh)).shard_shape(shape)
    needs.append(Need('parameters', axes, shape, 4 * math.prod(part)))
  rows, T, vocab = batch // mesh.size, config.seq_len, vocabulary(config)
  itemsize = jax.numpy.dtype(cache_dtype).itemsize
  for stored in model.blocks.attention.cache_shapes().values():
    nbytes = config.num_layers * rows * T * math.prod(stored) * itemsize
    needs.append(Need('the cache', ('L', 'T'), (config.num_layers, T), nbytes))
  chunk = min(chunk, T)
  needs.append(Need('logits', ('vocab',), (vocab,), 4 * rows * chunk * vocab))
  return needs


def vocabulary(config: ConfigDict) -> int:
  """The size that data.tokenizer or a probe says, before any text is read; 1 if none does.

  A tokenizer.json that is not there says none: a run has its own, wherever that of its config is.
  """
  probe = probes.parse(config)
  if probe is not None:
    return probe.vocab
  try:
    return _vocabulary(config.data.tokenizer)
  except UserError:
    return 1


@functools.cache
def _vocabulary(spec: str) -> int:
  asked = re.fullmatch(r'bpe:(\d+)', spec)
  if asked:
    return int(asked[1])
  tokenizer = tokenizers.ready(spec)
  return tokenizer.vocab_size if tokenizer else 1


def available(proc: Path = Path('/proc'), cgroups: Path = Path('/sys/fs/cgroup')) -> int:
  """Bytes of memory that this process could have, swap included; generous where in doubt.

  What it holds already counts as free: malloc keeps what an earlier trial used for the next one.
  Limits of cgroups (containers, batch systems) and of the process (ulimit) are looked at.
  """
  own = _table(proc / 'self' / 'status').get('RssAnon', 0)
  system = _table(proc / 'meminfo')
  rooms = [system.get('MemAvailable', UNKNOWN), *_cgroup_rooms(proc, cgroups)]
  limits = [min(rooms) + own + system.get('SwapFree', 0)]
  if min(rooms) == UNKNOWN and hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
    limits.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  return min(limits + _process_limits())


def _check(doing: str, needs: list[Need], config: ConfigDict, mesh: Mesh) -> None:
  on_a_device = sum(need.nbytes for need in needs)
  if _is_cpu(mesh):  # its devices share the memory
    wanted, there, where = on_a_device * len(mesh.local_devices), available(), 'memory'
  else:
    wanted, there = on_a_device, _limit(mesh)
    where = 'memory on each device'
  if wanted <= there:
    return
  name = to_lower(needs, config)
  parts: dict[str, int] = {}
  for need in needs:
    parts[need.what] = parts.get(need.what, 0) + need.nbytes
  what, most = max(parts.items(), key=lambda part: part[1])
  share = f'{most / on_a_device:.0%} of it for {what}'
  raise UserError(
    f'{name}={_value(config, name)}: {doing} needs at least {_gib(wanted)} of {where} ({share}), '
    f'and there are {_gib(there)}; lower {name}'
  )


def to_lower(needs: list[Need], config: ConfigDict) -> str:
  """The field with the largest part in the needs; of several alike, that of the largest number."""
  shares: dict[str, int] = {}
  sizes: dict[str, int] = {}
  for need in needs:
    for letter, size in zip(need.axes, need.shape, strict=True):
      shares[letter] = shares.get(letter, 0) + need.nbytes
      sizes[letter] = max(sizes.get(letter, 0), size)
  most = max(share for letter, share in shares.items() if letter in SIZES)
  alike = [letter for letter in SIZES if shares.get(letter, 0) >= ALIKE * most]
  name = SIZES[max(alike, key=lambda letter: sizes[letter])]
  stand_ins = {'ffn_dim': 'param_budget', 'value_head_dim': 'head_dim'}  # where the field is 0
  return stand_ins.get(name, name) if _value(config, name) == 0 else name


def _value(config: ConfigDict, name: str):
  group, _, key = name.rpartition('.')
  return (config[group] if group else config)[key]


def _abstract_model(config: ConfigDict) -> model_lib.Decoder:
  return nnx.eval_shape(lambda: model_lib.make_model(config, vocabulary(config)))


def _weights(model: model_lib.Decoder) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
  """Axis letters and shape of every parameter."""
  for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    yield leaf.get_metadata('axes'), leaf.shape


def _is_cpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == 'cpu'


def _gib(nbytes: int) -> str:
  return f'{nbytes / 2**30:,.1f} GiB'


def _table(path: Path) -> dict[str, int]:
  """The lines 'NAME: NUMBER kB' of a file under /proc, in bytes; none where there is none."""
  try:
    found = re.findall(r'^(\w+):\s+(\d+) kB$', path.read_text(encoding='utf-8'), re.M)
  except (OSError, UnicodeDecodeError):
    return {}
  return {name: int(number) * 1024 for name, number in found}


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
  """For each cgroup of this process and those above it: the limit, less what it surely holds."""
  for line in _text(proc / 'self' / 'cgroup').splitlines():
    _, controllers, place = line.split(':', 2)
    if not controllers:  # version 2
      root, limit, held = cgroups, 'memory.max', 'anon'
    elif 'memory' in controllers.split(','):
      root, limit, held = cgroups / 'memory', 'memory.limit_in_bytes', 'total_rss'
    else:
      continue
    lowest = root / place.strip('/')
    for folder in (lowest, *lowest.parents):
      if not folder.is_relative_to(root):
        break
      bound = _text(folder / limit).strip()
      if bound.isdigit():
        stat = re.search(rf'^{held} (\d+)$', _text(folder / 'memory.stat'), re.M)
        yield max(0, int(bound) - (int(stat[1]) if stat else 0))


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError):
    return ''


def _process_limits() -> list[int]:
  try:
    import resource
  except ImportError:  # not a Unix
    return []
  limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
  return [limit for limit in limits if limit != resource.RLIM_INFINITY]
