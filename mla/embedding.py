"""The embedding's lookup where the table is split over the mesh.

XLA's own way there moves tokens and float32 states between devices, or copies all of them to each.
Here the table is treated as other weights are: gathered along fsdp in the compute dtype, its
gradient added up in float32 on each device and exchanged once. Along tensor each device looks up
the tokens it has.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mla.sharding import constrain, spread, sum_over


def lookup(
  table: Float[Array, 'vocab D'], tokens: Int[Array, 'B T'], dtype: jnp.dtype
) -> Float[Array, 'B T D']:
  """The tokens' rows of the table, in dtype."""
  vocabulary = spread('vocab', len(table))
  if not vocabulary + spread('D', table.shape[1]):
    return table[tokens].astype(dtype)
  return _lookup(table, tokens, dtype, vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table, tokens, dtype, vocabulary):
  return _forward(table, tokens, dtype, vocabulary)[0]


def _forward(table, tokens, dtype, vocabulary):
  w = table
  if spread('D', table.shape[1]):  # still split when it is cast, or it would be gathered in float32
    w = constrain(constrain(table.astype(dtype), 'vocab', 'D'), 'vocab', 'D_whole')
  rows = PartitionSpec(spread('B', len(tokens)) or None)

  def local(w, tokens):
    index, here = _find(tokens, len(w), vocabulary)
    return jax.lax.psum(jnp.where(here, w[index], 0).astype(dtype), vocabulary)

  given = PartitionSpec(vocabulary or None), rows
  x = jax.shard_map(local, in_specs=given, out_specs=rows, check_vma=False)(w, tokens)
  return x, (table, tokens)


def _backward(dtype, vocabulary, saved, d_x):
  table, tokens = saved
  rows, width = spread('B', len(tokens)), spread('D', table.shape[1])
  width = width if set(width) <= set(rows) else ()
  mesh = jax.sharding.get_abstract_mesh()
  shape = len(table) // math.prod(mesh.shape[axis] for axis in vocabulary), table.shape[1]

  def local(d_x, tokens):
    index, here = _find(tokens, shape[0], vocabulary)
    d_x = jnp.where(here, d_x, 0).astype(jnp.float32)
    d_table = jnp.zeros(shape, jnp.float32).at[index].add(d_x)
    return sum_over(d_table, rows, width, axis=1)

  given = (PartitionSpec(rows or None),) * 2
  result = PartitionSpec(vocabulary or None, width or None)
  d_table = jax.shard_map(local, in_specs=given, out_specs=result, check_vma=False)(d_x, tokens)
  return d_table, None


_lookup.defvjp(_forward, _backward)


def _find(tokens: Array, size: int, vocabulary: tuple[str, ...]) -> tuple[Array, Array]:
  """Each token's row in this device's `size` rows of the table; and [B,T,1], whether it has one."""
  if vocabulary:
    tokens -= jax.lax.axis_index(vocabulary).astype(tokens.dtype) * size
  here = (tokens >= 0) & (tokens < size)
  return jnp.where(here, tokens, 0), here[..., None]
