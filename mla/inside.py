"""What lies in a run's cache and how it is read: spectra of latents, attention maps, and losses
through caches whose parts differ in dtype. For looking at, not for training or decoding.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla import generate, sharding
from mla import model as model_lib
from mla.cache import Cache
from mla.data.pipeline import Data, eval_windows, load_run_data, text_tokenizer
from mla.errors import UserError
from mla.evaluate import load_model
from mla.workdir import read_config

# Every process needs a mesh to lay a model out on; one device is enough to look at it.
ONE_DEVICE = {'data': 1, 'fsdp': 1, 'tensor': 1}
AT_ONCE = 2**13  # tokens, whose logits are held: 1.6 GB with a vocabulary of 50,000


class Run(NamedTuple):
  config: ConfigDict
  model: model_lib.Decoder
  step: int
  data: Data


def open_run(workdir: Path) -> Run:
  """The newest checkpoint of a run, and its text; UserError as evaluate.load_model."""
  config = read_config(workdir)
  config.attention_impl = 'auto'
  data = load_run_data(workdir, config)
  text_tokenizer(config, data.tokenizer)  # refuses a probe's run
  mesh = sharding.make_mesh(ONE_DEVICE)
  model, step = load_model(workdir, config, data.tokenizer.vocab_size, data.digest, mesh)
  return Run(config, model, step, data)


def write(run: Run, prompt: str, steps: int, seed: int = 0) -> str:
  """The prompt and up to `steps` tokens of what follows, through a bfloat16 cache."""
  parts = [prompt]
  tokenizer = text_tokenizer(run.config, run.data.tokenizer)
  writer = generate.Run(run.config, tokenizer, run.model, run.step)
  generate.write(
    writer, [prompt], lambda row, text: parts.append(text), steps=steps, temperature=0.7, seed=seed
  )
  return ''.join(parts)


def windows(run: Run, targets: int) -> Int[np.ndarray, 'B window']:
  """Whole windows of about so many targets, evenly spread over the validation text.

  Each has seq_len + 1 tokens.

  Of a run that keeps documents apart only those within one; UserError where none is.
  """
  length = run.config.seq_len
  found = eval_windows(run.data.validation, seq_len=length, max_tokens=targets + length)
  whole = found.mask.all(axis=1)
  if found.starts is not None:
    whole &= found.starts[:, -1] == 0
    if not whole.any():
      raise UserError(
        'data.packing=documents: no window of the validation text lies within one document, and '
        'what is looked at here sees all of its window'
      )
  return found.tokens[whole]


def kept(model: model_lib.Decoder, tokens: Int[Array | np.ndarray, 'B T']) -> dict[str, np.ndarray]:
  """{what the variant keeps: [L, B, T, ...]}, from a float32 cache that has read the tokens."""
  batch, length = tokens.shape

  def read(model, tokens):
    cache = model_lib.allocate_cache(model, batch=batch, slots=length, dtype='float32')
    _, cache = model_lib.prefill(model, cache, tokens, jnp.full(batch, length, jnp.int32))
    return [{name: stored.values for name, stored in layer.items()} for layer in cache.layers]

  layers = jax.jit(read)(model, tokens)
  return {name: np.stack([np.asarray(layer[name]) for layer in layers]) for name in layers[0]}


def spectrum(vectors: Float[np.ndarray, '*n C']) -> Float[np.ndarray, ' C']:
  """The share of the vectors' variance along each principal axis, the largest first."""
  flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
  variances = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2
  shares = np.zeros(flat.shape[1])  # fewer vectors than dims leave the rest at none
  shares[: len(variances)] = variances / variances.sum()
  return shares


def effective_rank(shares: Float[np.ndarray, ' C']) -> float:
  """exp of the shares' entropy: C if all are equal, 1 if one has all (Roy and Vetterli 2007)."""
  some = shares[shares > 0]
  return float(np.exp(-np.sum(some * np.log(some))))


def attention_maps(
  model: model_lib.Decoder, tokens: Int[Array | np.ndarray, 'B T']
) -> Float[np.ndarray, 'L B H T T']:
  """Each head's attention over the tokens, of a model with a latent; rows sum to 1."""
  positions = np.arange(tokens.shape[1])[None]

  def look(model, tokens):
    x, maps = model.embed(tokens), []
    for block in model.layers():
      h = block.attention_norm(x)
      entries = block.attention.compress(h, positions)
      content, rotary = block.attention.scores(h, entries, positions)
      seen = np.tril(np.ones((tokens.shape[1],) * 2, bool))
      maps.append(jax.nn.softmax(jnp.where(seen, content + rotary, -jnp.inf), axis=-1))
      x, _ = block.parallel(x, positions)
    return jnp.stack(maps)

  return np.asarray(jax.jit(look)(model, tokens))


def losses(
  model: model_lib.Decoder, texts: Int[np.ndarray, 'B window'], dtypes: Mapping[str, str]
) -> Float[np.ndarray, 'B T']:
  """Each target's NLL in nats, read through a cache that keeps each thing in a dtype of its own.

  `dtypes` says which, by what the variant keeps; what it does not name is kept in float32.
  """
  count, length = texts.shape
  groups = math.ceil(texts.size / AT_ONCE)
  rows = math.ceil(count / groups)
  groups = math.ceil(count / rows)
  filled = np.resize(texts, (groups, rows, length))  # the first ones again fill the last group
  found = [_losses(model, jnp.asarray(group), tuple(dtypes.items())) for group in filled]
  return np.concatenate(found).astype(np.float64)[:count]


@functools.partial(jax.jit, static_argnames='dtypes')
def _losses(
  model: model_lib.Decoder, texts: Int[Array, 'B window'], dtypes: tuple[tuple[str, str], ...]
) -> Float[Array, 'B T']:
  batch, length = texts.shape[0], texts.shape[1] - 1
  caches = {
    dtype: model_lib.allocate_cache(model, batch=batch, slots=length, dtype=dtype).layers
    for dtype in {'float32', *dict(dtypes).values()}
  }
  layers = tuple(
    {name: caches[dict(dtypes).get(name, 'float32')][index][name] for name in layer}
    for index, layer in enumerate(caches['float32'])
  )
  logits, _ = model_lib.decode(model, Cache(layers, jnp.zeros(batch, jnp.int32)), texts[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:])


def cost_of_int8(
  model: model_lib.Decoder, texts: Int[np.ndarray, 'B window'], names: tuple[str, ...]
) -> dict[str, Any]:
  """{what is kept in int8: (loss more than with float32, 1.96 standard errors over windows)}.

  Each of `names` alone and all of them together, on the same windows.
  """
  whole = losses(model, texts, {}).mean(axis=1)
  found = {}
  for part in [*((name,) for name in names), names]:
    more = losses(model, texts, dict.fromkeys(part, 'int8')).mean(axis=1) - whole
    error = 1.96 * more.std(ddof=1) / np.sqrt(len(more))
    found[' and '.join(part)] = (float(more.mean()), float(error))
  return found
