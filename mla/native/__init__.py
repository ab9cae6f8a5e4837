"""Attention and its cache on CPU cores in C++ (causal.cc, cached.cc), called through XLA's FFI.

Built at first use by the system's C++ compiler (c++, or what CXX names), for this machine's
processor, and kept in ~/.cache/mla-lab/native. Without a compiler, or on another backend, usable()
is False, and attention/kernels.py and cache.py use XLA's operations. Everything is float32 inside;
a cache is read as it lies.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from mla import sharding

Held = tuple[Array, Array | None]
"""A cache.Stored: values [B, K, S, dims], and scales [B, K, S] where they are int8."""

SOURCES = sorted(Path(__file__).parent.glob('*.cc'))
HEADERS = sorted(Path(__file__).parent.glob('*.h'))
LIBRARIES = Path('~/.cache/mla-lab/native')
FLAGS = '-std=c++17 -O3 -march=native -fno-math-errno -shared -fPIC'.split()
TARGETS = ('mla_causal_forward', 'mla_causal_backward', 'mla_cached_forward', 'mla_append')


@functools.cache
def usable() -> bool:
  """Whether programs traced here can call what is built here: on a CPU, where it could be."""
  if jax.default_backend() != 'cpu':
    return False
  if not load():
    logging.getLogger(__name__).warning(
      'attention runs as XLA operations, slower than in C++: %s; install g++ 12 or later, '
      'or clang++ 15 or later',
      _failure,
    )
  return load()


@functools.cache
def load() -> bool:
  """Builds and registers the C++ part, once; False where that cannot be. Starts no JAX backend."""
  global _failure
  try:
    library = ctypes.CDLL(str(_build()))
  except (OSError, subprocess.SubprocessError) as error:
    said = (getattr(error, 'stderr', '') or str(error)).strip().splitlines()
    _failure = said[0] if said else type(error).__name__
    return False
  for name in TARGETS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  return True


_failure = ''  # why load() returned False


def _build() -> Path:
  """The shared library of these sources, compiler and processor; compiled unless it is there."""
  asked = shlex.split(os.environ.get('CXX') or 'c++')  # 'ccache g++'
  if shutil.which(asked[0]) is None:
    raise OSError(f'there is no C++ compiler {asked[0]} on the PATH')
  command = [*asked, *FLAGS, f'-isystem{jax.ffi.include_dir()}']
  sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
  identity = [*command, jax.__version__, _processor(), _run([*asked, '--version']), *sources]
  name = hashlib.sha256('\n'.join(identity).encode()).hexdigest()[:20]
  library = LIBRARIES.expanduser() / f'{name}.so'
  if not library.exists():
    library.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and moved into place whole, as several processes may do this at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
      made = Path(folder) / library.name
      objects = [Path(folder) / f'{source.stem}.o' for source in SOURCES]
      jobs = [
        [*command, '-c', source, '-o', of] for source, of in zip(SOURCES, objects, strict=True)
      ]
      with ThreadPoolExecutor(len(jobs)) as threads:
        list(threads.map(_run, jobs))
      _run([*command, *objects, '-o', made])
      made.replace(library)
  return library


def _run(command: Sequence[str | Path]) -> str:
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
  """What -march=native depends on: a home folder may be shared by unlike machines."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
  return '\n'.join(sorted({line for line in lines if line.startswith(('model', 'flags', 'Feat'))}))


def causal(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Float[Array, 'B T _ _']],
  values: Float[Array, 'B T K V'],
  scale: float,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H T']]:
  """causal_attention's output, float32, and the log of each softmax's sum."""

  def local(*arrays):
    batch, length, heads, _ = arrays[0].shape
    shapes = (batch, length, heads, arrays[-1].shape[-1]), (batch, heads, length)
    return _call('mla_causal_forward', shapes, arrays, len(queries), scale)

  axes = ['BTH_'] * len(queries) + ['BTK_'] * (len(keys) + 1)
  arrays = (*queries, *keys, values)
  out, log_sums = _per_device(local, arrays, axes, ['BTH_', 'BHT'], values.shape[2])
  return out, log_sums


def causal_gradients(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Float[Array, 'B T _ _']],
  values: Float[Array, 'B T K V'],
  out: Float[Array, 'B T H V'],
  log_sums: Float[Array, 'B H T'],
  d_out: Float[Array, 'B T H V'],
  scale: float,
) -> tuple[Array, ...]:
  """The gradients of queries, keys and values, from what causal() gave and its output's gradient.

  Each part of the keys gets K heads, also one that has a single head for all: sum those.
  """
  parts = len(queries)

  def local(*arrays):
    groups = arrays[2 * parts].shape[2]
    shapes = [x.shape for x in arrays[: 2 * parts + 1]]
    shapes[parts : 2 * parts] = [(*s[:2], groups, s[3]) for s in shapes[parts : 2 * parts]]
    return _call('mla_causal_backward', shapes, arrays, parts, scale)

  given = ['BTH_'] * parts + ['BTK_'] * (parts + 1)
  arrays = (*queries, *keys, values, out, log_sums, d_out)
  groups = values.shape[2]
  # The letter of a key's gradient is that of the values, whatever heads the key itself has.
  return _per_device(local, arrays, [*given, 'BTH_', 'BHT', 'BTH_'], given, groups)


def cached(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Held],
  values: Held,
  positions: Int[Array, 'B T'],
  scale: float,
) -> Float[Array, 'B T H V']:
  """cached_attention, float32. Slots beyond a row's last position are not read."""

  def local(*arrays):
    shape = (*arrays[0].shape[:3], arrays[-3].shape[-1])
    # B and K as one axis: of a K of 1 XLA would make a copy, for the layout's sake.
    flat = [x.reshape(math.prod(x.shape[:2]), *x.shape[2:]) for x in arrays[len(queries) : -1]]
    inputs = [*arrays[: len(queries)], *flat, arrays[-1]]
    return _call('mla_cached_forward', [shape], inputs, len(queries), scale)

  arrays, axes = list(queries), ['BTH_'] * len(queries)
  for array, scale_of in (*keys, values):
    arrays += [array, jnp.zeros((*array.shape[:2], 0)) if scale_of is None else scale_of]
    axes += ['BKS_', 'BKS']
  groups = values[0].shape[1]
  return _per_device(local, (*arrays, positions), [*axes, 'BT'], ['BTH_'], groups)[0]


def append(
  into: Shaped[Array, 'B *slots'], new: Shaped[Array, 'B *new'], starts: Int[Array, ' B'], axis: int
) -> Shaped[Array, 'B *slots']:
  """`into` with each row's new slots, along `axis`, from starts[b] on; in place if donated."""

  def local(into, new, starts):
    result = jax.ShapeDtypeStruct(into.shape, into.dtype)
    sizes = {
      'slots': into.shape[axis],
      'count': new.shape[axis],
      'slot_bytes': into.dtype.itemsize * math.prod(into.shape[axis:][1:]),
    }
    call = jax.ffi.ffi_call(
      'mla_append', result, input_output_aliases={0: 0}, vmap_method='sequential'
    )
    return (call(into, new, starts, **sizes),)

  axis %= into.ndim
  axes = 'B' + 'K' * (axis - 1) + 'S' + '_' * (into.ndim - axis - 1)
  groups = math.prod(into.shape[1:axis])
  return _per_device(local, (into, new, starts), [axes, axes, 'B'], [axes], groups)[0]


def _call(
  target: str, shapes: Sequence[tuple[int, ...]], arrays: Sequence[Array], parts: int, scale: float
) -> tuple[Array, ...]:
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  call = jax.ffi.ffi_call(target, results, vmap_method='sequential')
  return tuple(call(*arrays, parts=parts, scale=np.float32(scale)))


def _per_device(
  function: Callable[..., tuple[Array, ...]],
  arrays: Sequence[Array],
  axes: Sequence[str],
  result_axes: Sequence[str],
  groups: int,
) -> tuple[Array, ...]:
  """function on each device's rows and heads: XLA cannot split what it does not see into.

  Axes are given by their letters. Heads are split where the key heads are, so that a query stays
  with the keys it reads; a key's single head for all is on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*arrays)
  rows, heads = (math.prod(mesh.shape[name] for name in sharding.RULES[x]) for x in 'BK')
  split = {'B': arrays[0].shape[0] % rows == 0, 'H': groups % heads == 0, 'K': groups % heads == 0}

  def spec(letters: str, sizes: Sequence[int] | None = None) -> PartitionSpec:
    return PartitionSpec(*(
      sharding.RULES[letter] if split.get(letter) and not (sizes and sizes[i] == 1) else None
      for i, letter in enumerate(letters)
    ))  # fmt: skip

  given = tuple(spec(letters, x.shape) for letters, x in zip(axes, arrays, strict=True))
  results = tuple(spec(letters) for letters in result_axes)
  return jax.shard_map(function, in_specs=given, out_specs=results, check_vma=False)(*arrays)
