"""Nested MLA: one latent, of which each prefix is a usable latent too.

config.nested names the prefixes, e.g. 8,16,32,64 of latent_dim=64. They cut the latent in blocks,
which are kept as arrays of their own. Nothing of a block depends on what lies beyond it: its norm
runs over itself, and so do the scales of an int8 cache. (RMSNorm over the whole latent would let
the tail, dropped or not, set the size of the rest.)

In training every row of a batch is cut to one of the widths, so that one forward pass trains them
all; the idea is Matryoshka's (Kusupati et al. 2022, arXiv 2205.13147), put to a latent's cache.
"""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from mla.attention import latent
from mla.attention.latent import LatentAttention
from mla.attention.variant import Rule, Variant
from mla.backends import rms_norm
from mla.layers import EPSILON, project


def widths_of(config: ConfigDict) -> tuple[int, ...]:
  """The prefixes' widths, ascending, latent_dim the last; none of a model that can't be cut."""
  if config.attention != 'mla':
    return ()
  return tuple(int(width) for width in config.nested.split(',') if width)


class NestedLatentAttention(LatentAttention):
  """MLA that keeps its latent in blocks, latent_8, latent_16, ... by where they end."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    super().__init__(config, rngs)
    ends = widths_of(config)
    self.ends = nnx.static({f'latent_{end}': end for end in ends})
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    blocks = {name: (size,) for name, size in zip(self.ends, sizes, strict=True)}
    self.shapes = nnx.static({**blocks, 'k_rope': (config.rope_dim,)})
    # At first every width is the narrowest model, and each block then learns what it can add. Drawn
    # for the whole, the narrow ones begin with keys and values too small, and all widths pull the
    # shared weights their own way: 0.07 nats behind after 400 steps (docs/log.md).
    first = jnp.arange(config.latent_dim, dtype=jnp.int32) < ends[0]
    share = jnp.where(first, (config.latent_dim / ends[0]) ** 0.5, 0.0)
    for up in (self.w_uk, self.w_uv):
      up[...] *= share[:, None, None]

  def _latents(self, x: Float[Array, 'B T D']) -> dict[str, Array]:
    """Each block by a product of its own: to the bit what it is where the others aren't made."""
    cuts = list(self.ends.values())[:-1]
    weights = jnp.split(self.w_dkv[...], cuts, axis=-1)
    gains = jnp.split(self.latent_norm.gain[...], cuts)
    return {
      name: rms_norm(project(x, weight), gain, EPSILON)
      for name, weight, gain in zip(self.ends, weights, gains, strict=True)
    }

  def cut(self, entries: dict[str, Array], widths: Int[Array, ' B']) -> dict[str, Array]:
    """What compress gave, as it would be of a row whose latent has widths[b] dims: 0 beyond."""
    return {
      name: jnp.where((widths >= self.ends[name])[:, None, None], entry, 0)
      if name in self.ends
      else entry
      for name, entry in entries.items()
    }


def draw_widths(
  widths: tuple[int, ...], key: Key[Array, ''], step: Int[Array, ''], rows: int
) -> Int[Array, ' B']:
  """The width each row of a step's batch is cut to; the same for the same key and step.

  Of four rows two are whole, one has the least width, and one has any.
  """
  choices = jnp.asarray(widths, jnp.int32)
  key = jax.random.fold_in(key, step)
  drawn = choices[jax.random.randint(key, (rows,), 0, len(widths), jnp.int32)]
  place = (jnp.arange(rows, dtype=jnp.int32) + step) % 4
  return jnp.where(place % 2 == 0, choices[-1], jnp.where(place == 1, choices[0], drawn))


def prefix(params: nnx.State, width: int) -> nnx.State:
  """The weights of the model whose latent is the first `width` dims: arrays that are smaller."""

  def cut(leaf: nnx.Variable) -> nnx.Variable:
    axes = leaf.get_metadata('axes')
    if 'C' not in axes:
      return leaf
    return leaf.replace(jax.lax.slice_in_dim(leaf[...], 0, width, axis=axes.index('C')))

  return jax.tree.map(cut, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def prefix_config(config: ConfigDict, width: int) -> ConfigDict:
  """That model's config, but for ffn_dim, which the whole latent's was solved for."""
  config = config.copy_and_resolve_references()
  config.latent_dim = width
  config.nested = ','.join(str(end) for end in widths_of(config) if end <= width)
  return config


def _module(config: ConfigDict, rngs: nnx.Rngs) -> LatentAttention:
  return (NestedLatentAttention if config.nested else LatentAttention)(config, rngs)


def _rules(config: ConfigDict) -> Iterator[Rule]:
  yield from latent.MLA.rules(config)
  cure = 'must be widths with commas between, such as 8,16,32,64; or empty'
  yield (
    re.fullmatch(r'([1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*)?', config.nested) is not None,
    'nested',
    cure,
  )
  widths = widths_of(config)
  ascend = list(widths) == sorted(set(widths))
  last = not widths or widths[-1] == config.latent_dim
  yield ascend and last, 'nested', f'must ascend and end in latent_dim={config.latent_dim}'
  yield (
    not widths or config.latent_norm,
    'nested',
    'needs latent_norm=True, for its blocks have norms',
  )


def _vectors(config: ConfigDict) -> list[int]:
  """MLA's elements; the latent's in blocks."""
  ends = widths_of(config) or (config.latent_dim,)
  return [*(b - a for a, b in zip((0, *ends), ends, strict=False)), config.rope_dim]


MLA = Variant(_module, latent.MLA.label, latent.MLA.fields, _rules, _vectors)
