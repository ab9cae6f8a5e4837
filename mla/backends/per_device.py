"""A backend's kernel on every device of the mesh: XLA cannot split what it does not see into."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mla.sharding import rule, split_over


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


def per_query_head(
  attend: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array
) -> Array:
  """attend(q, k, v) on each device's rows and query heads, with the key heads that these read.

  q is [B,T,H,dims], k and v [B,T,K,dims]. Key heads fewer than the devices of the tensor axis lie
  whole on each of them, which takes the one its queries read. For what JAX differentiates: the
  gradients of such keys are summed over the devices, once, after the kernel.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes, heads, groups = () if mesh.empty else rule('H', mesh), q.shape[2], k.shape[2]
  devices = math.prod(mesh.shape[name] for name in axes)
  if groups % devices == 0 or heads % devices or devices % groups:
    return per_device(
      lambda *arrays: (attend(*arrays),), (q, k, v), ['BTH_', 'BTK_', 'BTK_'], ['BTH_'], groups
    )[0]

  def local(q: Array, k: Array, v: Array) -> Array:
    mine = jax.lax.axis_index(axes) * groups // devices
    return attend(q, *(jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=2) for x in (k, v)))

  rows = split_over('B', q.shape[0], mesh) or None
  split, whole = PartitionSpec(rows, None, axes), PartitionSpec(rows)
  return jax.shard_map(local, in_specs=(split, whole, whole), out_specs=split, check_vma=False)(
    q, k, v
  )
