"""The decoder: embed, blocks (scanned or unrolled), norm, logits; and the four ways to run it.

forward   all tokens at once                         training, and the reference for the rest
prefill   the same, and fills a cache                a prompt
decode    the newest tokens, through the cache       one token or a chunk
generate  prefill, then decode in one compiled loop
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from mla import cache as cache_lib
from mla import remat
from mla.attention import append, make_attention
from mla.attention.rope import Positions
from mla.backends import Starts, swiglu
from mla.cache import Cache
from mla.embedding import lookup
from mla.errors import UserError
from mla.layers import RMSNorm, project, weight
from mla.loss import only_tokens
from mla.sharding import constrain
from mla.windows import NONE


class FeedForward(nnx.Module):
  """SwiGLU (Shazeer 2020, arXiv 2002.05202): (silu(x W_gate) * x W_up) W_down."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    D, F = config.d_model, config.ffn_dim
    self.w_gate = weight(rngs, fan_in=D, D=D, F=F)
    self.w_up = weight(rngs, fan_in=D, D=D, F=F)
    self.w_down = weight(rngs, fan_in=F, scale=(2 * config.num_layers) ** -0.5, F=F, D=D)

  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    return project(swiglu(project(x, self.w_gate), project(x, self.w_up)), self.w_down)


class Block(nnx.Module):
  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.norm_eps, D=config.d_model)
    self.attention = make_attention(config, rngs)
    self.ffn_norm = RMSNorm(config.norm_eps, D=config.d_model)
    self.ffn = FeedForward(config, rngs)

  def parallel(
    self,
    x: Float[Array, 'B T D'],
    positions: Positions,
    widths: Int[Array, ' B'] | None = None,
    starts: Starts = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, Array]]:
    """All tokens at once; also returns what a cache would keep of them.

    widths: to which each row's nested latent is cut (mla/attention/nested.py).
    """
    x = constrain(x, 'B', 'T', 'D_whole')
    h = self.attention_norm(x)
    entries = self.attention.compress(h, positions)
    if widths is not None:
      entries = self.attention.cut(entries, widths)
    entries = {name: checkpoint_name(entry, remat.LATENTS) for name, entry in entries.items()}
    x = x + self.attention.attend(h, entries, positions, starts)
    return x + self.ffn(self.ffn_norm(x)), entries

  def cached(
    self,
    x: Float[Array, 'B T D'],
    layer: dict,
    positions: Int[Array, 'B T'],
    starts: Starts = None,
  ) -> tuple[Float[Array, 'B T D'], dict]:
    """The newest tokens: written to the cache first, so that they too are seen as it keeps them."""
    x = constrain(x, 'B', 'T', 'D_whole')
    h = self.attention_norm(x)
    entries = self.attention.compress(h, positions)
    layer = append(layer, entries, positions[:, 0], impl=self.attention.impl)
    x = x + self.attention.attend_cached(h, layer, positions, starts)
    return x + self.ffn(self.ffn_norm(x)), layer


# Layers up to which compilation takes no longer unrolled than scanned.
MOST_UNROLLED = 8

# Of every random key, whatever jax_default_prng_impl says: a seed draws the same for everybody, and
# checkpoints hold the data of such keys.
PRNG = 'threefry2x32'


class Decoder(nnx.Module):
  """A decoder-only transformer; parameters float32, computation in config.dtype, logits float32."""

  def __init__(self, config: ConfigDict, vocab: int, rngs: nnx.Rngs):
    D = config.d_model
    self.dtype = jnp.dtype(config.dtype)
    self.remat = config.remat
    self.num_layers = config.num_layers
    self.vocab = vocab  # tokens; more rows than these round the size, and mean nothing
    vocab += -vocab % max(1, config.round_to)
    self.embedding = weight(rngs, fan_in=1, scale=config.embedding_std, vocab=vocab, D=D)
    self.blocks = _stack(config, rngs)
    self.norm = RMSNorm(config.norm_eps, D=D)
    if not config.tie_embeddings:
      self.w_out = weight(rngs, fan_in=D, D=D, vocab=vocab)

  def embed(self, tokens: Int[Array, 'B T *parts']) -> Float[Array, 'B T D']:
    """The tokens' embeddings; of several a position (mla/windows.py) their sum."""
    if tokens.ndim == 2:
      return lookup(self.embedding[...], tokens, self.dtype)
    flat = jnp.maximum(tokens, 0).reshape(len(tokens), -1)
    parts = lookup(self.embedding[...], flat, self.dtype).reshape(*tokens.shape, -1)
    return jnp.sum(parts, axis=2, where=(tokens != NONE)[..., None])

  def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T vocab']:
    logits = project(self.norm(x), self.unembedding()).astype(jnp.float32)
    return only_tokens(logits, self.vocab)

  def unembedding(self) -> Float[Array, 'D vocab']:
    """What makes logits of the normed states."""
    return self.w_out[...] if hasattr(self, 'w_out') else self.embedding[...].T

  def layers(self) -> Iterator[Block]:
    """The blocks one by one, for decoding: each layer's cache is an array of its own."""
    graphdef, stacked = nnx.split(self.blocks)
    for index in range(self.num_layers):
      yield nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))

  def attentions(self) -> list[Any]:
    """A layer's attention each, for what it is and keeps; here they are all one."""
    return [self.blocks.attention] * self.num_layers


def _stack(config: ConfigDict, rngs: nnx.Rngs) -> Block:
  """All blocks as one, each weight with a leading L axis for the scan."""

  @nnx.split_rngs(splits=config.num_layers)
  @nnx.vmap
  def create(rngs: nnx.Rngs) -> Block:
    return Block(config, rngs)

  blocks = create(rngs)
  for _, leaf in nnx.iter_graph(blocks):
    if isinstance(leaf, nnx.Param):
      leaf.set_metadata('axes', ('L', *leaf.get_metadata('axes')))
  return blocks


def make_model(config: ConfigDict, vocab: int) -> Decoder:
  """A freshly drawn model. With ffn_dim=0 the feed-forward width is solved to meet param_budget."""
  config = config.copy_and_resolve_references()
  config.ffn_dim = config.ffn_dim or solve_ffn_dim(config)
  return Decoder(config, vocab, nnx.Rngs(params=jax.random.key(config.seed, impl=PRNG)))


def forward(
  model: Decoder, tokens: Int[Array, 'B T *parts'], starts: Starts = None
) -> Float[Array, 'B T vocab']:
  """Logits of every token's successor, all positions in parallel."""
  return model.logits(_parallel(model, tokens, starts=starts)[0])


def states(
  model: Decoder,
  tokens: Int[Array, 'B T *parts'],
  widths: Int[Array, 'B L'] | None = None,
  starts: Starts = None,
) -> Float[Array, 'B T D']:
  """What unembedding() makes forward's logits of; mla/loss.py does without them.

  widths: to which each row's nested latent is cut in each layer; None: to none.
  """
  return model.norm(_parallel(model, tokens, widths, starts)[0])


def _parallel(
  model: Decoder, tokens: Array, widths: Array | None = None, starts: Array | None = None
) -> tuple[Array, dict[str, Array]]:
  """The last block's output, and what a cache would keep: entries[name] is [L, B, T, *shape]."""
  positions = np.arange(tokens.shape[1])[None]
  graphdef, stacked = nnx.split(model.blocks)

  def block(x, layer):
    leaves, widths = layer
    return nnx.merge(graphdef, leaves).parallel(x, positions, widths, starts)

  # Rolled, a scan stacks what the backward pass needs and costs a step 12 %; but only a loop's body
  # is safe from having its recomputation merged away, so remat keeps it.
  unroll = model.remat == 'none' and model.num_layers <= MOST_UNROLLED
  if model.remat != 'none':
    block = jax.checkpoint(block, policy=remat.POLICIES[model.remat], prevent_cse=False)
  layers = (stacked, None if widths is None else widths.T)
  return jax.lax.scan(block, model.embed(tokens), layers, unroll=unroll)


def allocate_cache(model: Decoder, *, batch: int, slots: int, dtype: str) -> Cache:
  """An empty cache for this model; dtype is one of cache.DTYPES."""
  shapes = [attention.cache_shapes() for attention in model.attentions()]
  return cache_lib.allocate(shapes, batch=batch, slots=slots, dtype=dtype)


def prefill(
  model: Decoder, cache: Cache, tokens: Int[Array, 'B T *parts'], lengths: Array
) -> tuple[Float[Array, 'B vocab'], Cache]:
  """Runs prompts, right-padded to T, into an empty cache of at least T slots.

  lengths[b], an integer, of row b's tokens are real; the padding's slots are beyond every later
  query's sight until the tokens decoded next overwrite them. Returns the logits of each row's last
  real token; NaN if it has none. A row whose length is not in 0 .. T becomes one that is full:
  decoding gives it NaN. ValueError for shapes that don't fit.
  """
  _check_fit(cache, tokens, lengths)
  x, entries = _parallel(model, tokens)
  starts = jnp.zeros_like(cache.lengths)
  layers = tuple(
    append(
      layer,
      {name: entry[i] for name, entry in entries.items()},
      starts,
      impl=model.blocks.attention.impl,
    )
    for i, layer in enumerate(cache.layers)
  )
  fits = (lengths >= 0) & (lengths <= tokens.shape[1])
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1, mode='clip')
  logits = jnp.where((fits & (lengths > 0))[:, None], model.logits(last)[:, 0], jnp.nan)
  return logits, Cache(layers, jnp.where(fits, lengths, cache.slots).astype(jnp.int32))


def decode(
  model: Decoder, cache: Cache, tokens: Int[Array, 'B T *parts'], starts: Starts = None
) -> tuple[Float[Array, 'B T vocab'], Cache]:
  """Appends T tokens to every row; returns their logits, all they attend to read from the cache.

  starts: from which slot on each token sees it.

  A row without T slots left is lost: its T tokens are not written, their logits and all later ones
  are NaN. The other rows are as ever. ValueError for more tokens than slots.
  """
  _check_fit(cache, tokens, cache.lengths)
  lengths = cache.lengths.astype(jnp.int32)
  positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  x = model.embed(tokens)
  layers = []
  for block, layer in zip(model.layers(), cache.layers, strict=True):
    x, layer = block.cached(x, layer, positions, starts)
    layers.append(layer)
  return model.logits(x), Cache(tuple(layers), lengths + tokens.shape[1])


def _check_fit(cache: Cache, tokens: Array, lengths: Array) -> None:
  if tokens.shape[1] > cache.slots:
    raise ValueError(f'{tokens.shape[1]} tokens do not fit in a cache of {cache.slots} slots')
  if lengths.shape != cache.lengths.shape or len(tokens) != len(lengths):
    raise ValueError(f'{tokens.shape} tokens, {lengths.shape} lengths, {cache.lengths.shape} rows')
  if not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(f'lengths: {lengths.dtype}; must be integers')


@functools.partial(jax.jit, static_argnames=('steps', 'temperature', 'top_p'), donate_argnums=1)
def generate(
  model: Decoder,
  cache: Cache,
  prompts: Int[Array, 'B T'],
  lengths: Array,
  key: Key[Array, ''],
  *,
  steps: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> tuple[Int[Array, 'B steps'], Cache]:
  """Continues right-padded prompts by `steps` tokens each, in the donated cache.

  temperature=0 takes the likeliest token; otherwise samples from the smallest set of tokens whose
  probability reaches top_p (Holtzman et al. 2019, arXiv 1904.09751). A row whose length is not in
  1 .. T has nothing to go on from: its tokens are -1. ValueError for what can't fit.
  """
  if prompts.shape[1] + steps > cache.slots:
    raise ValueError(
      f'{prompts.shape[1]} prompt tokens and {steps} more do not fit in {cache.slots} cache slots'
    )
  last, cache = prefill(model, cache, prompts, lengths)
  pick = functools.partial(sample, temperature=temperature, top_p=top_p)
  first_key, key = jax.random.split(key)

  def step(carry, key):
    cache, token = carry
    logits, cache = decode(model, cache, token[:, None])
    following = pick(logits[:, 0], key)
    return (cache, following), token

  carry = (cache, pick(last, first_key))
  (cache, final), tokens = jax.lax.scan(step, carry, jax.random.split(key, steps - 1))
  real = (lengths > 0) & (lengths <= prompts.shape[1])
  tokens = jnp.concatenate([tokens.T, final[:, None]], axis=1)
  return jnp.where(real[:, None], tokens, -1), cache


def sample(
  logits: Float[Array, 'B vocab'], key: Key[Array, ''], *, temperature: float, top_p: float
) -> Int[Array, ' B']:
  """One token a row; see generate."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    floor = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < floor, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def count_params(model: Decoder) -> tuple[int, int]:
  """Parameters in all, and those outside the embedding and the output projection."""
  sizes = {
    path: math.prod(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  total = sum(sizes.values())
  return total, total - sizes['embedding',] - sizes.get(('w_out',), 0)


FFN_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
BUDGET_TOLERANCE = 0.0025  # so that any two arms differ by at most 0.5 %
ROUNDED_TOLERANCE = 0.005  # with round_to


def solve_ffn_dim(config: ConfigDict) -> int:
  """The feed-forward width at which non-embedding parameters meet config.param_budget.

  Parameters are linear in the width, so two abstract models tell slope and offset for any variant.
  Among the widths within BUDGET_TOLERANCE the roundest wins, for the sake of the matmul units. With
  config.round_to it is the nearest multiple of that, if within ROUNDED_TOLERANCE. Raises UserError
  if no width is.
  """

  def count(width: int) -> int:
    trial = config.copy_and_resolve_references()
    trial.ffn_dim = width
    return count_params(nnx.eval_shape(lambda: Decoder(trial, 1, nnx.Rngs(0))))[1]

  slope = count(2) - count(1)
  exact = (config.param_budget - count(1)) / slope + 1
  rounded = config.round_to > 1
  tolerance = ROUNDED_TOLERANCE if rounded else BUDGET_TOLERANCE
  for multiple in (config.round_to,) if rounded else FFN_MULTIPLES:
    width = max(1, round(exact / multiple)) * multiple
    if abs(width - exact) * slope <= tolerance * config.param_budget:
      return width
  if exact < 1:
    raise UserError(
      f'param_budget={config.param_budget}: the model has {count(1) - slope:,} parameters without '
      f'its feed-forward part, and each of its dims adds {slope:,}; raise param_budget to at least '
      f'{count(1)}, or lower d_model, num_heads or num_layers'
    )
  if rounded:
    raise UserError(
      f'round_to={config.round_to}: no ffn_dim that is a multiple of it meets '
      f'param_budget={config.param_budget} to {ROUNDED_TOLERANCE:.1%}; lower it, or set ffn_dim'
    )
  below = count(1) + (math.floor(exact) - 1) * slope
  raise UserError(
    f'param_budget={config.param_budget}: no ffn_dim meets it, for each of its dims adds {slope:,} '
    f'parameters; set it to {below} or {below + slope}, or set ffn_dim instead'
  )
