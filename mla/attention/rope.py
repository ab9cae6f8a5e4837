"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Positions = Int[Array | np.ndarray, '#B T']
"""Each token's place in its row. Where numpy knows it, XLA folds the angles into constants."""


def rope(
  x: Float[Array, 'B T *heads R'], positions: Positions, base: float
) -> Float[Array, 'B T *heads R']:
  """Rotates x by its tokens' positions (Su et al. 2021, arXiv 2104.09864).

  Half-split layout, as in Llama: dims i and i + R/2 form a pair, turning by base^(-2i/R) radians a
  token. R is even. Angles are float32 whatever x's dtype.
  """
  half = x.shape[-1] // 2
  frequencies = (base ** (-np.arange(half) / half)).astype(np.float32)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  # The split's gradient is one concatenation; two slices' is two pads.
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
