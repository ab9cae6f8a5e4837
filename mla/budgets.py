"""How a nested model's cache is best spent over its layers.

Layers need not keep prefixes of one width. The search starts from whole latents and, step by step,
takes one layer down by one width: the one that adds least KL divergence, from the whole model's
predictions, for the elements it frees. Greedy, so each point of its curve holds the next, and a
model of so few layers is searched in a minute; the best of all combinations it need not be.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla.attention import nested
from mla.backends import Starts
from mla.model import Decoder, states

BATCH = 32


class Budget(NamedTuple):
  widths: tuple[int, ...]  # of each layer's latent
  divergence: float  # nats a token, on the calibration windows


def search(
  model: Decoder,
  config: ConfigDict,
  windows: Int[np.ndarray, 'W window'],
  starts: Int[np.ndarray, 'W T'] | None = None,
) -> Iterator[Budget]:
  """From the whole latents to the narrowest, one layer and one width at a time.

  `windows` are calibration text: not what the budgets are then judged on. `starts`: from which
  position on each token sees it, where documents are kept apart.
  """
  widths = nested.widths_of(config)
  now = Budget((widths[-1],) * config.num_layers, 0.0)
  yield now
  while any(width > widths[0] for width in now.widths):
    tried = {}
    for layer, width in enumerate(now.widths):
      if width > widths[0]:
        narrower = widths[widths.index(width) - 1]
        cut = (*now.widths[:layer], narrower, *now.widths[layer + 1 :])
        found = Budget(cut, divergence(model, windows, cut, starts))
        tried[found] = (found.divergence - now.divergence) / (width - narrower)
    now = min(tried, key=lambda found: tried[found])
    yield now


def divergence(
  model: Decoder,
  windows: Int[np.ndarray, 'W window'],
  widths: tuple[int, ...],
  starts: Int[np.ndarray, 'W T'] | None = None,
) -> float:
  """KL(whole model || that cut to widths[i] in layer i), nats a token, mean over the windows."""
  parts = []
  for first in range(0, len(windows), BATCH):
    rows = slice(first, first + BATCH)
    of_rows = None if starts is None else starts[rows]
    parts.append(_divergence(model, windows[rows, :-1], jnp.asarray(widths, jnp.int32), of_rows))
  return float(np.mean(np.concatenate(parts)))


@jax.jit
def _divergence(
  model: Decoder, tokens: Int[Array, 'B T'], widths: Int[Array, ' L'], starts: Starts
) -> Float[Array, ' B']:
  def predict(cut: Array | None) -> Array:
    x = states(model, tokens, cut, starts)
    logits = x @ model.unembedding().astype(x.dtype)
    return jax.nn.log_softmax(logits[..., : model.vocab].astype(jnp.float32))

  whole, cut = predict(None), predict(jnp.broadcast_to(widths, (len(tokens), len(widths))))
  return jnp.mean(jnp.sum(jnp.exp(whole) * (whole - cut), axis=-1), axis=-1)
