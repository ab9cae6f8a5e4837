"""The arrays a variant keeps for each token: allocate, quantise, count their bytes.

A variant names the vectors it keeps per token, e.g. {'latent': (C,), 'k_rope': (R,)}; each becomes
one array a layer, allocated once and written in place by backends.append (donate the cache to the
jitted step). Slot s of a row holds that row's token of position s, so rows of different lengths
share one batch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from mla import sharding

DTYPES = ('float32', 'bfloat16', 'int8')

Shapes = Mapping[str, tuple[int, ...]]
"""Per token and layer: the name and shape of each thing kept; the last axis is one vector."""


class Stored(NamedTuple):
  """One cached array of one layer. S lies next to the vectors, so that a head reads one block."""

  values: Array  # [B, *heads, S, dims]
  scale: Float[Array, 'B *heads S'] | None  # int8 only: one float32 a stored vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What the model remembers of a batch: each layer's arrays, and the tokens held per row."""

  layers: tuple[dict[str, Stored], ...]
  lengths: Int[Array, ' B']

  @property
  def slots(self) -> int:
    return next(iter(self.layers[0].values())).values.shape[-2]

  def nbytes(self) -> int:
    """Bytes of the allocated arrays, scales included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

  def bytes_per_token(self) -> float:
    """Bytes of the allocated arrays over the token slots they were allocated for."""
    return self.nbytes() / (self.lengths.shape[0] * self.slots)

  def bytes_per_token_per_device(self) -> float:
    """The same of what one device holds of the arrays: a part, or all where they aren't split."""
    held = sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(self.layers)
    )
    return held / (self.lengths.shape[0] * self.slots)


def allocate(shapes: Sequence[Shapes], *, batch: int, slots: int, dtype: str) -> Cache:
  """An empty cache of `slots` tokens for each of `batch` rows; dtype is one of DTYPES.

  `shapes` has what each layer keeps.
  """
  if dtype not in DTYPES:
    raise ValueError(f'cache dtype must be one of {", ".join(DTYPES)}; got {dtype!r}')

  def array(shape: tuple[int, ...]) -> Stored:
    *heads, dims = shape
    scale = jnp.zeros((batch, *heads, slots), jnp.float32) if dtype == 'int8' else None
    return Stored(jnp.zeros((batch, *heads, slots, dims), dtype), scale)

  layers = tuple({name: array(shape) for name, shape in layer.items()} for layer in shapes)
  return Cache(layers, jnp.zeros(batch, jnp.int32))


def shardings(layers, batch: int, mesh: Mesh):
  """A NamedSharding for each array of a cache's layers, abstract ones too: rows on data and fsdp,
  key heads on tensor.

  Where rows don't split evenly, being fewer than devices for instance, slots lie on data and fsdp.
  """
  by_rows = bool(sharding.split_over('B', batch, mesh))

  def one(array, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec(axes, array.shape, mesh))

  def both(stored: Stored) -> Stored:
    heads = ('K',) * (stored.values.ndim - 3)
    axes = ('B', *heads, 'S') if by_rows else ('rows', *heads, 'B')
    scale = None if stored.scale is None else one(stored.scale, axes)
    return Stored(one(stored.values, (*axes, 'dims')), scale)  # type: ignore[arg-type]

  return tuple({name: both(stored) for name, stored in layer.items()} for layer in layers)


def quantise(
  x: Float[Array, '*vectors dims'],
) -> tuple[Int[Array, '*vectors dims'], Float[Array, '*vectors']]:
  """Symmetric int8 with one float32 scale a vector: x ~ values * scale, within scale / 2."""
  wide = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=-1) / 127
  values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
  return values.astype(jnp.int8), scale
