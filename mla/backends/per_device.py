"""Attention over a mesh: a backend's kernel on every device, for XLA cannot split what it does not
see into; and key heads where there are fewer than devices to share them."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mla.sharding import constrain, rule


def per_device(
  function: Callable[..., tuple[Array, ...]],
  arrays: Sequence[Array],
  axes: Sequence[str],
  result_axes: Sequence[str],
  groups: int,
) -> tuple[Array, ...]:
  """function on each device's rows and heads, where a mesh of several devices is set.

  Axes are given by their letters. Heads are split where the key heads, of which there are `groups`,
  are, so that a query stays with the keys it reads; a key's single head for all is on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*arrays)
  rows, heads = (math.prod(mesh.shape[name] for name in rule(letter, mesh)) for letter in 'BK')
  split = {'B': arrays[0].shape[0] % rows == 0, 'H': groups % heads == 0, 'K': groups % heads == 0}

  def spec(letters: str, sizes: Sequence[int] | None = None) -> PartitionSpec:
    return PartitionSpec(*(
      rule(letter, mesh) if split.get(letter) and not (sizes and sizes[i] == 1) else None
      for i, letter in enumerate(letters)
    ))  # fmt: skip

  given = tuple(spec(letters, x.shape) for letters, x in zip(axes, arrays, strict=True))
  results = tuple(spec(letters) for letters in result_axes)
  return jax.shard_map(function, in_specs=given, out_specs=results, check_vma=False)(*arrays)


def share_key_heads(
  keys: Sequence[Array], values: Array, heads: int
) -> tuple[Sequence[Array], Array]:
  """[B,T,K,dims] with each key head repeated until the mesh can split them as it does H heads.

  A device then has the key heads that its own query heads read, and no others: none is repeated in
  its memory. Their gradients are summed over devices once, after attention; of key heads that lie
  whole XLA would sum them in each turn of a loop. Where H heads don't split evenly, and without a
  mesh, all stays as it is; so does a key's single head for all.
  """
  mesh, groups = jax.sharding.get_abstract_mesh(), values.shape[2]
  devices = 1 if mesh.empty else math.prod(mesh.shape[name] for name in rule('K', mesh))
  wanted = math.lcm(groups, devices)
  if wanted == groups or heads % wanted:
    return keys, values

  def repeated(x: Array) -> Array:
    return constrain(jnp.repeat(x, wanted // groups, axis=2), 'B', 'T', 'K', 'dims')

  return [key if key.shape[2] == 1 else repeated(key) for key in keys], repeated(values)
