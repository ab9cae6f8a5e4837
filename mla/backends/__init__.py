"""The door to attention's backends: softmax(Q K^T) V over whole sequences and through a cache, and
writing to a cache.

A backend is a module of this package with some of causal, cached and append, each of blockwise's
signature, and missing(), which says why it can't run here ('' where it can). To what it cannot do
it answers NotImplemented, or raises NotImplementedError with a reason that the user is told once;
blockwise, which runs everywhere, does that. Dtypes, ranks, sizes and the sharing of heads are
checked here, once for all of them, at trace time: ValueError in one line. That is why the public
functions' annotations say so little.

impl, a config's attention_impl, is 'auto', which goes by the devices the program is compiled for,
or a backend's name.
"""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mla.backends import blockwise
from mla.backends.per_device import share_key_heads
from mla.cache import DTYPES, Stored, quantise
from mla.errors import UserError

# Each backend but blockwise, and the platform it is for. Without its module the rest works.
PLATFORMS = {'cpu': 'cpu', 'cudnn': 'gpu', 'splash': 'tpu'}

Starts = Int[Array, 'B T'] | None
"""Where in its row each token's document begins, in rows of several that attention keeps apart.

Positions run on through such a row: rotations tell distances, and a document's stay what they are.
"""

_counted = False


@contextlib.contextmanager
def counted() -> Iterator[None]:
  """While it lasts, attention is traced so that XLA sees all its FLOPs: blockwise, as one block."""
  global _counted
  _counted = True
  try:
    yield
  finally:
    _counted = False


def causal_attention(
  queries: Sequence[Array],
  keys: Sequence[Array],
  values: Array,
  *,
  scale: float,
  starts: Array | None = None,
  impl: str = 'auto',
) -> Array:
  """Causal attention of T tokens among themselves: [B,T,H,V]; H is a multiple of K.

  queries[i] is [B,T,H,dims], values [B,T,K,V]; query head h reads key head h // (H/K). The score is
  scale times the sum over i of <queries[i], keys[i]>: MLA's has a part per head and a rotary part,
  the grouped variants' only one. keys[i] is [B,T,K,dims], or [B,T,1,dims] for all heads. All have
  one float dtype; the softmax is float32. Memory is linear in T, gradients included.

  starts, Starts, [B,T] integers: a token sees those from starts[b,t] on, which is at most where it
  is itself, and the same for all tokens between.
  """
  _check_queries(queries, keys)
  batch, length, heads, _ = queries[0].shape
  _check('values', values, (batch, length, None, None))
  groups = _check_groups(heads, values.shape[2])
  for i, key in enumerate(keys):
    _check(f'keys[{i}]', key, (batch, length, {1, groups}, queries[i].shape[3]))
  for name, array in (*((f'keys[{i}]', key) for i, key in enumerate(keys)), ('values', values)):
    _require(array.dtype == queries[0].dtype, f'{name}: {array.dtype}, queries {queries[0].dtype}')
  starts = _checked_starts(starts, (batch, length))
  if _counted:
    return blockwise.causal(queries, keys, values, scale, starts, block=length)
  keys, values = share_key_heads(keys, values, heads)
  return _run(impl, 'causal', queries, keys, values, scale, starts)


def cached_attention(
  queries: Sequence[Array],
  keys: Sequence[Stored],
  values: Sequence[Stored],
  positions: Array,
  *,
  scale: float,
  starts: Array | None = None,
  impl: str = 'auto',
) -> Array:
  """Attention of T new tokens to a cache whose slot s holds the token of position s: [B,T,H,V].

  queries[i] is [B,T,H,dims] and positions [B,T], integers; the score is the sum over i of
  <queries[i], keys[i]>: MLA's has a latent and a rotary part, the grouped variants' only one.
  keys[i] is [B,K,S,dims], or [B,1,S,dims] for all heads; values[i] is [B,K,S,dims], V dims in all,
  and more than one where parts of a value have scales of their own. A query at position p sees the
  slots up to p; with starts, Starts, [B,T] integers, from starts[b,t] on, which is at most p. An
  int8 cache is never expanded: its scales multiply scores and weights.

  A row with a position of S or more has more tokens than the cache has slots, and append has not
  written them: it gets NaN.
  """
  _check_queries(queries, keys)
  batch, length, heads, _ = queries[0].shape
  _require(len(values) > 0, 'no cached values')
  _check('cached values[0]', values[0].values, (batch, None, None, None))
  groups, slots = _check_groups(heads, values[0].values.shape[1]), values[0].values.shape[2]
  for i, value in enumerate(values):
    _check(f'cached values[{i}]', value.values, (batch, groups, slots, None))
  for i, key in enumerate(keys):
    _check(f'cached keys[{i}]', key.values, (batch, {1, groups}, slots, queries[i].shape[3]))
  for stored in (*keys, *values):
    _check_stored(stored)
  _check_integers('positions', positions, (batch, length))
  positions = positions.astype(jnp.int32)
  starts = _checked_starts(starts, (batch, length))
  impl = 'blockwise' if _counted else impl
  return _run(impl, 'cached', queries, keys, values, positions, scale, starts)


def append(stored: Stored, new: Array, starts: Array, *, impl: str = 'auto') -> Stored:
  """Writes each row's T new tokens [B,T,*heads,dims] into its slots from starts[b] on.

  In place, if the cache is donated. More tokens than slots are refused. A row that has fewer slots
  left than T keeps what it has; positions beyond the last slot then give NaN when it is read.
  """
  _check_stored(stored)
  _require(new.ndim == stored.values.ndim, f'new tokens {new.shape}: cache {stored.values.shape}')
  batch, *heads, slots, dims = stored.values.shape
  _check('new tokens', new, (batch, None, *heads, dims))
  _require(jnp.issubdtype(new.dtype, jnp.floating), f'new tokens: {new.dtype}; must be floats')
  length = new.shape[1]
  _require(length <= slots, f'{length} tokens do not fit in a cache of {slots} slots')
  _check_integers('starts', starts, (batch,))
  starts = starts.astype(jnp.int32)
  new = jnp.moveaxis(new, 1, -2)  # [B,*heads,T,dims]
  if stored.scale is None:
    new = new.astype(stored.values.dtype)
    return Stored(_run(impl, 'append', stored.values, new, starts, new.ndim - 2), None)
  values, scale = quantise(new)
  return Stored(
    _run(impl, 'append', stored.values, values, starts, values.ndim - 2),
    _run(impl, 'append', stored.scale, scale, starts, scale.ndim - 1),
  )


def rms_norm(x: Array, gain: Array, epsilon: float) -> Array:
  """x / rms(x) * gain over the last axis, in float32; the CPU plugin brings a gradient by hand.

  Elsewhere, too, the backward pass gets nothing but x and the gain.
  """
  plugin = _plugin('cpu') if _platform() == 'cpu' else None
  if plugin is not None:
    return plugin.rms_norm(x, gain, epsilon)
  return jax.checkpoint(functools.partial(blockwise.rms_norm, epsilon=epsilon))(x, gain)


def swiglu(gate: Array, up: Array) -> Array:
  """silu(gate) * up. The backward pass gets these two, but on CPUs, where memory is not as short as
  elementwise work is slow, what was computed between as well."""

  def product(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up

  return product(gate, up) if _platform() == 'cpu' else jax.checkpoint(product)(gate, up)


def check(impl: str, mesh: Mesh) -> None:
  """Raises UserError if impl can't run on the mesh's devices; for before anything is made."""
  with jax.set_mesh(mesh):
    _chosen(impl)


def prepare(rows: int, *, cores: int = 0, mesh: Mapping[str, int] | None = None) -> None:
  """Before JAX's first use: lets `cores` cores (0: all) work well on batches of `rows` rows.

  mesh is config.mesh. Touches no GPU or TPU.
  """
  if cores:
    os.environ['NPROC'] = str(cores)  # XLA's number of threads
  plugin = _plugin('cpu')
  if plugin is not None:
    plugin.prepare(rows, cores or core_count(), mesh or {})


def core_count() -> int:
  """Cores this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _run(impl: str, name: str, *args):
  """The first answer of the backends that impl names, blockwise the last of them."""
  for backend in _chosen(impl):
    function = getattr(backend, name, None)
    try:
      answer = NotImplemented if function is None else function(*args)
    except NotImplementedError as error:
      _warn(backend.__name__.split('.')[-1], str(error))
      continue
    if answer is not NotImplemented:
      return answer
  return getattr(blockwise, name)(*args)


def _chosen(impl: str) -> list[ModuleType]:
  """Those to be asked before blockwise; UserError for one that is asked for and can't run."""
  if impl == 'blockwise':
    return []
  platform = _platform()
  if impl != 'auto':
    if PLATFORMS.get(impl) != platform:
      raise UserError(f'attention_impl={impl}: is not for {platform}; choose auto or blockwise')
    plugin = _plugin(impl)
    reason = 'is not part of this installation' if plugin is None else plugin.missing()
    if plugin is None or reason:
      raise UserError(f'attention_impl={impl}: {reason}; or choose auto')
    return [plugin]
  able = []
  for name in (name for name, its in PLATFORMS.items() if its == platform):
    plugin = _plugin(name)
    reason = plugin.missing() if plugin else ''
    if reason:
      _warn(name, reason)
    elif plugin:
      able.append(plugin)
  return able


def _platform() -> str:
  """Of the devices that what is traced now is compiled for: those of the mesh that is set, or else
  the default one. So one machine can compile for another."""
  default = jax.config.jax_default_device  # type: ignore[attr-defined]
  device = jax.sharding.get_abstract_mesh().abstract_device or default
  if device is None:
    return jax.default_backend()
  return device.split(':')[0] if isinstance(device, str) else device.platform


@functools.cache
def _plugin(name: str) -> ModuleType | None:
  path = f'{__name__}.{name}'
  try:
    return importlib.import_module(path)
  except ModuleNotFoundError as error:
    if error.name != path:
      raise
    return None


@functools.cache
def _warn(name: str, reason: str) -> None:
  """Once."""
  logging.getLogger(__name__).warning(
    'attention runs as XLA operations, slower than by the %s backend: %s', name, reason
  )


def _require(holds: bool, message: str) -> None:
  if not holds:
    raise ValueError(f'attention: {message}')


def _check(name: str, array: Array, sizes: Sequence[int | set[int] | None]) -> None:
  """The array's rank and sizes; None stands for any size but 0, a set for a choice."""

  def fits(size: int, asked: int | set[int] | None) -> bool:
    return size > 0 if asked is None else size in (asked if isinstance(asked, set) else {asked})

  said = ', '.join(
    '?' if s is None else ' or '.join(map(str, sorted(s))) if isinstance(s, set) else str(s)
    for s in sizes
  )
  right = array.ndim == len(sizes) and all(map(fits, array.shape, sizes))
  _require(right, f'{name}: must be [{said}]; got {list(array.shape)}')


def _check_queries(queries: Sequence[Array], keys: Sequence) -> None:
  _require(
    len(queries) == len(keys) > 0, f'{len(queries)} parts of queries, {len(keys)} parts of keys'
  )
  for i, query in enumerate(queries):
    shape = (None,) * 3 if i == 0 else queries[0].shape[:3]
    _check(f'queries[{i}]', query, (*shape, None))
    _require(query.dtype == queries[0].dtype, f'queries: {queries[0].dtype} and {query.dtype}')
  floats = jnp.issubdtype(queries[0].dtype, jnp.floating)
  _require(floats, f'queries: {queries[0].dtype}; must be floats')


def _check_groups(heads: int, groups: int) -> int:
  _require(heads % groups == 0, f'{heads} query heads do not share {groups} key heads evenly')
  return groups


def _check_stored(stored: Stored) -> None:
  """A dtype that a cache may have, with scales where it is int8 and else without."""
  values, scale = stored
  _require(values.ndim >= 3 and values.size > 0, f'cache: got {list(values.shape)}')
  _require(
    str(values.dtype) in DTYPES, f'cache: {values.dtype}; must be one of {", ".join(DTYPES)}'
  )
  needed = values.dtype == jnp.int8
  _require(needed == (scale is not None), f'cache: {values.dtype}, scales: {scale is not None}')
  if scale is not None:
    _check('scales', scale, values.shape[:-1])
    _require(scale.dtype == jnp.float32, f'scales: {scale.dtype}; must be float32')


def _checked_starts(starts: Array | None, sizes: Sequence[int]) -> Array | None:
  if starts is None:
    return None
  _check_integers('starts', starts, sizes)
  return starts.astype(jnp.int32)


def _check_integers(name: str, array: Array, sizes: Sequence[int]) -> None:
  _check(name, array, sizes)
  _require(jnp.issubdtype(array.dtype, jnp.integer), f'{name}: {array.dtype}; must be integers')
