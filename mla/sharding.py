"""The device mesh, and which array axis lies on which mesh axis."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from ml_collections import ConfigDict

from mla.errors import UserError, first_line

# Of activations: axis letter -> mesh axes. Letters not named here are whole on every device: the
# latent C among them, since every head reads all of it (so under tensor parallelism each device
# holds a copy).
RULES = {
  'B': ('data', 'fsdp'),
  'D': ('fsdp',),
  'H': ('tensor',),
  'K': ('tensor',),
  'F': ('tensor',),
  'vocab': ('tensor',),
}
# Of weights, and so of their gradients and moments: fsdp takes the first axis that it divides.
WEIGHTS = {**RULES, 'C': ('fsdp',), 'Q': ('fsdp',)}
LARGE = 2**20  # bytes of a weight that is worth naming


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The (data, fsdp, tensor) mesh over all devices, those of this machine if none are given.

  At most one size is -1, "what is left". Of 0, "what is needed", there is one: how many are needed
  memory.py says.
  """
  try:
    available = jax.device_count() if devices is None else len(devices)
  except (RuntimeError, AssertionError) as error:  # what JAX_PLATFORMS names is not there
    asked = os.environ.get('JAX_PLATFORMS', '')
    raise UserError(
      f'JAX_PLATFORMS={asked}: JAX finds no such device ({first_line(error)}); unset it, or set it '
      'to what is there, such as cpu'
    ) from error
  sizes = {axis: size or 1 for axis, size in sizes.items()}
  known = math.prod(size for size in sizes.values() if size != -1)
  shape = {axis: available // known if size == -1 else size for axis, size in sizes.items()}
  if math.prod(shape.values()) != available:
    wanted = ' x '.join(f'{axis}={size}' for axis, size in sizes.items())
    raise UserError(
      f'mesh: {wanted} is not {available}, the number of devices there are; change mesh.*, or on a '
      'CPU set JAX_NUM_CPU_DEVICES to try it'
    )
  axes = ('data', 'fsdp', 'tensor')
  return jax.make_mesh(
    tuple(shape[axis] for axis in axes),
    axes,
    axis_types=(AxisType.Auto,) * len(axes),
    devices=devices,
  )


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
  """Raises UserError unless every micro-batch splits evenly over the mesh's rows."""
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if (config.batch_size // config.accumulation_steps) % rows:
    raise UserError(
      f'batch_size={config.batch_size}: in {config.accumulation_steps} micro-batches does not '
      f'split over mesh.data x mesh.fsdp = {rows} devices; make it a multiple'
    )


def rule(letter: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """RULES' mesh axes for this letter, without those that a shard_map around has split already."""
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return tuple(name for name in RULES.get(letter, ()) if types[name] != AxisType.Manual)


def split_over(letter: str, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that an axis of this letter and size lies on; one that doesn't divide on none."""
  names = rule(letter, mesh)
  return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()


def spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The partition of an array with these axis letters."""
  places = (split_over(letter, size, mesh) for letter, size in zip(axes, shape, strict=True))
  return PartitionSpec(*(names or None for names in places))


def weight_spec(
  axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
  """The partition of a weight with these axis letters, by WEIGHTS."""
  taken: set[str] = set()
  places: list[tuple[str, ...] | None] = []
  for letter, size in zip(axes, shape, strict=True):
    names = WEIGHTS.get(letter, ())
    divides = size % math.prod(mesh.shape[name] for name in names) == 0
    fits = divides and taken.isdisjoint(names)
    places.append(names if names and fits else None)
    taken.update(names if fits else ())
  return PartitionSpec(*places)


def whole_weights(params: nnx.State, mesh: Mesh | AbstractMesh) -> dict[str, int]:
  """{name: bytes} of the large weights that fsdp, where there is any, could not split."""
  if mesh.shape['fsdp'] == 1:
    return {}
  found = {}
  for path, leaf in nnx.to_flat_state(params):
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    split = weight_spec(leaf.get_metadata('axes'), leaf.shape, mesh)
    if nbytes >= LARGE and 'fsdp' not in jax.tree.leaves(tuple(split)):
      found['.'.join(map(str, path))] = nbytes
  return found


def shardings(tree, mesh: Mesh | AbstractMesh):
  """A NamedSharding for each array in tree: weights by their axis letters, all else replicated."""

  def one(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    place = weight_spec(leaf.get_metadata('axes'), leaf.shape, mesh)
    return leaf.replace(NamedSharding(mesh, place))

  return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def placed(abstract, placement):
  """The abstract arrays of a tree, each where shardings() puts it."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    abstract,
    placement,
  )


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Holds an activation to RULES while a mesh is set (jax.set_mesh); otherwise leaves it alone."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def spread(letter: str, size: int) -> tuple[str, ...]:
  """split_over for the mesh that is set, without axes of one device; on none where none is set."""
  mesh = jax.sharding.get_abstract_mesh()
  names = () if mesh.empty else split_over(letter, size, mesh)
  return tuple(name for name in names if mesh.shape[name] > 1)


def sum_over(x: jax.Array, rows: tuple[str, ...], parts: tuple[str, ...], axis: int) -> jax.Array:
  """Within a shard_map: x summed over the mesh axes `rows`.

  Along those of them in `parts` each device gets only its part of x's `axis`.
  """
  for name in parts:
    x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
  return jax.lax.psum(x, tuple(name for name in rows if name not in parts))


def rows_here(size: int, mesh: Mesh) -> Int[np.ndarray, ' b']:
  """Which rows of a batch of this size lie on this process' devices, in order.

  Processes whose devices differ along tensor only hold the same rows.
  """
  places = rows_sharding(mesh).addressable_devices_indices_map((size,)).values()
  return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def put_batch(rows: np.ndarray, mesh: Mesh, size: int | None = None) -> jax.Array:
  """The batch of `size` rows of which this process has those of rows_here(), split over the mesh.

  Without a size these are all of it, as they always are where there is one process.
  """
  size = len(rows) if size is None else size
  here = rows_here(size, mesh)
  if len(here) != len(rows):
    raise ValueError(f'{len(rows)} rows where the mesh has {len(here)} of {size} here')

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    start, stop, _ = (index or (slice(None),))[0].indices(size)
    first = int(np.searchsorted(here, start))
    return rows[first : first + stop - start]

  return jax.make_array_from_callback((size, *rows.shape[1:]), rows_sharding(mesh), part)


def put_batches(batches: Any, mesh: Mesh, size: int | None = None) -> Any:
  """put_batch of each array in a tree."""
  return jax.tree.map(lambda rows: put_batch(rows, mesh, size), batches)


def everywhere(mesh: Mesh) -> NamedSharding:
  """Of an array that every device has."""
  return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Of an array whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(RULES['B']))
