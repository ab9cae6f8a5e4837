"""A trained model with less of its latent: a nested one as it was trained for, or a plain one.

Of a nested latent each prefix is a model, in all layers the same or one a layer. A plain latent was
made for no such thing: what cutting it costs all the same, as it lies or turned so that its
principal axes come first, is what a nested one is measured against.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla.attention import nested
from mla.backends import Starts, rms_norm
from mla.layers import EPSILON, project
from mla.model import Block, Decoder, make_model


class UnevenDecoder(Decoder):
  """A decoder whose layers keep latents of unlike widths. It decodes; nothing else."""

  def __init__(self, model: Decoder, blocks: Sequence[Block]):
    self.dtype, self.remat, self.vocab = model.dtype, model.remat, model.vocab
    self.num_layers = len(blocks)
    self.embedding, self.norm = model.embedding, model.norm
    if hasattr(model, 'w_out'):
      self.w_out = model.w_out
    self.by_layer = nnx.List(blocks)

  def layers(self) -> Iterator[Block]:
    return iter(self.by_layer)

  def attentions(self) -> list[Any]:
    return [block.attention for block in self.by_layer]


def cut_latent(model: Decoder, config: ConfigDict, width: int) -> tuple[Decoder, ConfigDict]:
  """The model whose latent is the first `width` dims of a nested one, and its config.

  `width` is one of config.nested. Projections and cache are smaller arrays.
  """
  config = nested.prefix_config(config, width)
  config.ffn_dim = model.blocks.ffn.w_gate.shape[-1]  # was solved for the whole, if at all
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, model.vocab)))
  return nnx.merge(graphdef, nested.prefix(nnx.state(model, nnx.Param), width)), config


def cut_layers(model: Decoder, config: ConfigDict, widths: Sequence[int]) -> Decoder:
  """The nested model of which layer i keeps the first widths[i] dims of its latent.

  Each is one of config.nested. What is smaller is the arrays.
  """
  small = {width: list(cut_latent(model, config, width)[0].layers()) for width in set(widths)}
  return UnevenDecoder(model, [small[width][layer] for layer, width in enumerate(widths)])


def latent_moments(
  model: Decoder,
  tokens: Int[Array | np.ndarray, 'B T'],
  starts: Int[Array | np.ndarray, 'B T'] | None = None,
) -> Float[np.ndarray, 'L C C']:
  """The mean outer product of a plain latent with itself, by layer, before its norm's gain."""

  def moments(model: Decoder, tokens: Array, starts: Starts) -> Array:
    x, positions, found = model.embed(tokens), np.arange(tokens.shape[1])[None], []
    for block in model.layers():
      latent = project(block.attention_norm(x), block.attention.w_dkv)
      latent = rms_norm(latent, jnp.ones_like(latent[0, 0]), EPSILON)
      found.append(jnp.einsum('btc,btd->cd', latent, latent) / tokens.size)
      x, _ = block.parallel(x, positions, starts=starts)
    return jnp.stack(found)

  return np.asarray(jax.jit(moments)(model, tokens, starts), np.float64)


def rotate_latent(model: Decoder, moments: Float[np.ndarray, 'L C C']) -> Decoder:
  """The same function with a plain latent turned: its principal axes, the largest first.

  moments: latent_moments. The norm's gain moves into the up-projections first: without it the norm
  divides by a length only, which no turning changes.
  """
  model = nnx.clone(model)
  attention = model.blocks.attention
  turns = jnp.asarray(np.linalg.eigh(moments)[1][:, :, ::-1], jnp.float32)
  gain = attention.latent_norm.gain[...]
  for up in (attention.w_uk, attention.w_uv):
    up[...] = jnp.einsum('lcd,lc,lchn->ldhn', turns, gain, up[...])
  attention.w_dkv[...] = attention.w_dkv[...] @ turns
  attention.latent_norm.gain[...] = jnp.ones_like(gain)
  return model


def cut_plain(
  model: Decoder, config: ConfigDict, width: int, moments: Float[np.ndarray, 'L C C']
) -> Decoder:
  """The first `width` dims of a latent that was not trained to be cut; arrays that are smaller.

  The norm then divides by the length of what is left. moments, those of this latent as it lies,
  tell how much that is, and the gain makes up for it on average.
  """
  energy = np.diagonal(moments, axis1=1, axis2=2)
  left = np.sqrt(energy[:, :width].sum(axis=1) / width)  # of a mean square of 1 over all
  config = config.copy_and_resolve_references()
  config.latent_dim, config.ffn_dim = width, model.blocks.ffn.w_gate.shape[-1]
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, model.vocab)))
  cut = nnx.merge(graphdef, nested.prefix(nnx.state(model, nnx.Param), width))
  gain = cut.blocks.attention.latent_norm.gain
  gain[...] = gain[...] * jnp.asarray(left, jnp.float32)[:, None]
  return cut
