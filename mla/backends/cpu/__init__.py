"""CPU cores: attention and its cache in C++ (causal.cc, cached.cc), called through XLA's FFI, and
what else makes XLA run well there: the process's memory and devices, RMSNorm's gradient.

Everything is float32 inside; a cache is read as it lies. Without a C++ compiler the rest remains.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from types import NotImplementedType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from mla.backends.cpu import host, library
from mla.backends.cpu.norm import rms_norm as rms_norm
from mla.backends.per_device import per_device
from mla.cache import Stored


def missing() -> str:
  """Why attention can't run in C++ here, and the cure; '' where it can."""
  return '' if library.load() else f'{library.failure}; install g++ 12 or later, or clang++ 15'


def prepare(rows: int, cores: int, mesh: Mapping[str, int]) -> None:
  """backends.prepare, with the number of cores."""
  host.use_devices(rows, cores, mesh, threaded=library.load())
  host.keep_freed_memory()


def causal(
  queries: Sequence[Array],
  keys: Sequence[Array],
  values: Array,
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> Array | NotImplementedType:
  """blockwise.causal of up to 32 bits."""
  if values.dtype.itemsize > 4:
    return NotImplemented
  arrays = [x.astype(jnp.float32) for x in (*queries, *keys, values)]
  return _causal(scale, starts, *arrays).astype(values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(scale: float, starts: Array | None, *arrays: Array) -> Float[Array, 'B T H V']:
  return _causal_forward(scale, starts, *arrays)[0]


def _causal_forward(scale, starts, *arrays):
  parts = len(arrays) // 2
  out, log_sums = causal_with_sums(arrays[:parts], arrays[parts:-1], arrays[-1], scale, starts)
  return out, (arrays, starts, out, log_sums)


def _causal_backward(scale, saved, d_out):
  arrays, starts, out, log_sums = saved
  parts = len(arrays) // 2
  gradients = causal_gradients(
    arrays[:parts], arrays[parts:-1], arrays[-1], out, log_sums, d_out, scale, starts
  )
  whole = (
    jnp.sum(gradient, axis=2, keepdims=True) if x.shape[2] < gradient.shape[2] else gradient
    for x, gradient in zip(arrays, gradients, strict=True)
  )
  return None, *whole


_causal.defvjp(_causal_forward, _causal_backward)


def causal_with_sums(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Float[Array, 'B T _ _']],
  values: Float[Array, 'B T K V'],
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H T']]:
  """Causal attention's output, float32, and the log of each softmax's sum."""

  def local(*arrays):
    batch, length, heads, _ = arrays[0].shape
    width = arrays[2 * len(queries)].shape[-1]
    shapes = (batch, length, heads, width), (batch, heads, length)
    return _call('mla_causal_forward', shapes, arrays, len(queries), scale)

  axes = ['BTH_'] * len(queries) + ['BTK_'] * (len(keys) + 1)
  arrays = (*queries, *keys, values)
  if starts is not None:
    arrays, axes = (*arrays, starts), [*axes, 'BT']
  out, log_sums = per_device(local, arrays, axes, ['BTH_', 'BHT'], values.shape[2])
  return out, log_sums


def causal_gradients(
  queries: Sequence[Float[Array, 'B T H _']],
  keys: Sequence[Float[Array, 'B T _ _']],
  values: Float[Array, 'B T K V'],
  out: Float[Array, 'B T H V'],
  log_sums: Float[Array, 'B H T'],
  d_out: Float[Array, 'B T H V'],
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> tuple[Array, ...]:
  """The gradients of queries, keys and values, from causal_with_sums and its output's gradient.

  Each part of the keys gets K heads, also one that has a single head for all: sum those.
  """
  parts = len(queries)

  def local(*arrays):
    groups = arrays[2 * parts].shape[2]
    shapes = [x.shape for x in arrays[: 2 * parts + 1]]
    shapes[parts : 2 * parts] = [(*s[:2], groups, s[3]) for s in shapes[parts : 2 * parts]]
    return _call('mla_causal_backward', shapes, arrays, parts, scale)

  results = ['BTH_'] * parts + ['BTK_'] * (parts + 1)
  given = [*results, 'BTH_', 'BHT', 'BTH_']
  arrays = (*queries, *keys, values, out, log_sums, d_out)
  if starts is not None:
    arrays, given = (*arrays, starts), [*given, 'BT']
  # The letter of a key's gradient is that of the values, whatever heads the key itself has.
  return per_device(local, arrays, given, results, values.shape[2])


def cached(
  queries: Sequence[Array],
  keys: Sequence[Stored],
  values: Sequence[Stored],
  positions: Int[Array, 'B T'],
  scale: float,
  starts: Int[Array, 'B T'] | None = None,
) -> Array | NotImplementedType:
  """blockwise.cached of queries up to 32 bits; of values in several parts only without scales.

  Slots beyond a row's last position are not read, but where parts of values are joined first.
  """
  if queries[0].dtype.itemsize > 4:
    return NotImplemented
  if len(values) > 1:
    if any(value.scale is not None for value in values):
      return NotImplemented
    queries, keys, values = _joined(queries, keys, values)

  def local(*arrays):
    stored = arrays[len(queries) : last]
    shape = (*arrays[0].shape[:3], stored[-2].shape[-1])
    # B and K as one axis: of a K of 1 XLA would make a copy, for the layout's sake.
    flat = [x.reshape(math.prod(x.shape[:2]), *x.shape[2:]) for x in stored]
    inputs = [*arrays[: len(queries)], *flat, *arrays[last:]]
    return _call('mla_cached_forward', [shape], inputs, len(queries), scale)

  arrays = [query.astype(jnp.float32) for query in queries]
  axes = ['BTH_'] * len(queries)
  for array, scales in (*keys, *values):
    none = jnp.zeros((*array.shape[:2], 0), jnp.float32)
    arrays += [array, none if scales is None else scales]
    axes += ['BKS_', 'BKS']
  last = len(arrays)
  seen = [positions] if starts is None else [positions, starts]
  axes += ['BT'] * len(seen)
  groups = values[0].values.shape[1]
  (out,) = per_device(local, (*arrays, *seen), axes, ['BTH_'], groups)
  return out.astype(queries[0].dtype)


def _joined(
  queries: Sequence[Array], keys: Sequence[Stored], values: Sequence[Stored]
) -> tuple[list[Array], list[Stored], list[Stored]]:
  """The values as one part, of which the kernel has one only; the keys that are values are it too.

  A copy of the cache at every call, which costs less than what XLA's operations do more.
  """
  whole = Stored(jnp.concatenate([value.values for value in values], axis=-1), None)
  parts = len(values)
  if [*map(id, keys[:parts])] != [*map(id, values)]:
    return list(queries), list(keys), [whole]
  query = jnp.concatenate(queries[:parts], axis=-1)
  return [query, *queries[parts:]], [whole, *keys[parts:]], [whole]


def append(
  into: Shaped[Array, ' B *slots'],
  new: Shaped[Array, ' B *new'],
  starts: Int[Array, ' B'],
  axis: int,
) -> Shaped[Array, ' B *slots']:
  """blockwise.append; in place if `into` is donated."""

  def local(into, new, starts):
    result = jax.ShapeDtypeStruct(into.shape, into.dtype)
    call = jax.ffi.ffi_call(
      'mla_append', result, input_output_aliases={0: 0}, vmap_method='sequential'
    )
    return (call(into, new, starts, axis=np.int64(axis)),)

  axes = 'B' + 'K' * (axis - 1) + 'S' + '_' * (into.ndim - axis - 1)
  groups = math.prod(into.shape[1:axis])
  return per_device(local, (into, new, starts), [axes, axes, 'B'], [axes], groups)[0]


def _call(
  target: str, shapes: Sequence[tuple[int, ...]], arrays: Sequence[Array], parts: int, scale: float
) -> tuple[Array, ...]:
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  call = jax.ffi.ffi_call(target, results, vmap_method='sequential')
  return tuple(call(*arrays, parts=np.int64(parts), scale=np.float32(scale)))
