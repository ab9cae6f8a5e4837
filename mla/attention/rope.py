"""Rotary position embedding."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla.rope_scaling import parse

Positions = Int[Array | np.ndarray, '#B T']
"""Each token's place in its row. Where numpy knows it, XLA folds the angles into constants."""


@dataclasses.dataclass(frozen=True)
class Rotation:
  """How pairs of dims turn: pair i of R/2 by base^(-2i/R) radians a token, unless scaled."""

  base: float
  scaling: str  # the config's rope_scaling

  def frequencies(self, half: int) -> Float[np.ndarray, ' half']:
    plain = self.base ** (-np.arange(half) / half)
    return parse(self.scaling).frequencies(plain, self.base).astype(np.float32)

  @property
  def amplitude(self) -> float:
    """The factor of cos and sin."""
    return parse(self.scaling).amplitude()

  @property
  def sharpness(self) -> float:
    """The factor of MLA's scores, beside the usual (N + R)^-1/2."""
    return parse(self.scaling).sharpness()


def rotation_of(config: ConfigDict) -> Rotation:
  return Rotation(config.rope_base, config.rope_scaling)


def rope(
  x: Float[Array, 'B T *heads R'], positions: Positions, rotation: Rotation
) -> Float[Array, 'B T *heads R']:
  """Rotates x by its tokens' positions (Su et al. 2021, arXiv 2104.09864).

  Half-split layout, as in Llama: dims i and i + R/2 form a pair. R is even. Angles are float32
  whatever x's dtype.
  """
  half = x.shape[-1] // 2
  frequencies = rotation.frequencies(half)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if rotation.amplitude != 1:
    cos, sin = cos * rotation.amplitude, sin * rotation.amplitude
  # The split's gradient is one concatenation; two slices' is two pads.
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
