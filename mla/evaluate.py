"""Perplexity read through the KV cache, and what that cache costs.

The protocol, so that anybody can repeat it:

- Text: the run's validation split, each document as BOS and its tokens, all concatenated.
- Windows of seq_len + 1 tokens at stride seq_len: every token but the stream's first is the target
  of exactly one prediction, document starts (BOS) among them. A token sees those before it in its
  window, across document boundaries, and nothing else. The last window may be shorter.
- Each window starts with an empty cache in the asked dtype and is fed in chunks of CHUNK tokens.
  A chunk is first written to the cache and then attends to what the cache gives back, its own
  tokens included: no key, value or latent is ever seen but through the cache. Computation is in the
  run's dtype, softmax and log-likelihoods in float32.
- perplexity = exp(total NLL / targets). bits_per_byte = total NLL in nats / (ln 2 * UTF-8 bytes of
  the targets' text; BOS has none).
- perplexity_ci95: percentile bootstrap, BOOTSTRAPS resamples of whole windows (tokens of a window
  are not independent), seed 0. It says how far another text of this kind would move the figure, not
  another training seed. None (null) below LEAST_WINDOWS windows, of which it would say too little.
- kv_cache_bytes_per_token: nbytes of the arrays allocated for the windows over their token slots.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla import backends, memory, sharding
from mla import cache as cache_lib
from mla import config as config_lib
from mla import model as model_lib
from mla.attention import VARIANTS
from mla.checkpoint import Checkpoints
from mla.data.pipeline import EvalWindows, eval_windows, load_data
from mla.errors import UserError
from mla.workdir import read_config

CHUNK = 64
BATCH = 32
BOOTSTRAPS = 2000
# Of normal windows what is called 95 % covers 50 % with 2, 84 % with 5, 90 % with 10, 94 % with 20.
LEAST_WINDOWS = 20


def evaluate_run(
  workdir: Path, cache_dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict:
  """One run's newest checkpoint on its validation split; the keys of eval.py's JSON.

  Raises UserError for a folder that holds no run, a damaged checkpoint, or a text that is not the
  one it was trained beside.
  """
  return score_run(workdir, cache_dtype, say)[0]


def score_run(
  workdir: Path,
  cache_dtype: str,
  say: Callable[[str], None] = lambda line: None,
  max_tokens: int | None = None,
) -> tuple[dict, Float[np.ndarray, ' W']]:
  """evaluate_run's figures, and each window's total NLL in nats.

  With max_tokens: on about so many targets in whole windows, evenly spread over the split.
  """
  if cache_dtype not in cache_lib.DTYPES:
    raise UserError(f'--cache_dtype={cache_dtype}: choose one of {", ".join(cache_lib.DTYPES)}')
  config = read_config(workdir)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  memory.check_reading(config, cache_dtype, mesh, batch=BATCH + -BATCH % mesh.size, chunk=CHUNK)
  try:
    backends.check(config.attention_impl, mesh)
  except UserError:  # it was for the devices that trained it
    config.attention_impl = 'auto'
  data = load_data(config)
  model, step = load_model(workdir, config, data.tokenizer.vocab_size, data.digest, mesh)
  windows = eval_windows(data.validation, seq_len=config.seq_len, max_tokens=max_tokens)
  say(f'{workdir}: {windows.mask.sum():,} targets through a {cache_dtype} cache')
  nll, bytes_per_token = nll_through_cache(model, windows, cache_dtype, mesh)
  targets = windows.mask.sum(axis=1)
  text_bytes = np.sum(data.tokenizer.byte_lengths[windows.tokens[:, 1:]] * windows.mask)
  total, body = model_lib.count_params(model)
  own = VARIANTS[config.attention].fields
  figures = {
    'workdir': str(workdir),
    'attention': config.attention,
    'latent_dim': config.latent_dim if 'latent_dim' in own else None,
    'params_total': total,
    'params_non_embedding': body,
    'step': step,
    'cache_dtype': cache_dtype,
    'kv_cache_bytes_per_token': bytes_per_token,
    'perplexity': float(np.exp(nll.sum() / targets.sum())),
    'perplexity_ci95': bootstrap_perplexity(nll, targets),
    'bits_per_byte': float(nll.sum() / (math.log(2) * text_bytes)),
    'tokens_evaluated': int(targets.sum()),
  }
  return figures, nll


def load_model(
  workdir: Path, config: ConfigDict, vocab: int, data: str, mesh: Mesh
) -> tuple[model_lib.Decoder, int]:
  """The newest checkpoint's model, whole on every device, and its step; `data`: text's digest.

  Raises UserError as Checkpoints.read_params.
  """
  model = nnx.eval_shape(lambda: model_lib.make_model(config, vocab))
  graphdef, params = nnx.split(model)
  everywhere = NamedSharding(mesh, PartitionSpec())
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), params
  )
  step, params = Checkpoints(workdir).read_params(
    target, {'config': config_lib.to_json(config), 'data': data}
  )
  return nnx.merge(graphdef, params), step


def nll_through_cache(
  model: model_lib.Decoder, windows: EvalWindows, cache_dtype: str, mesh: Mesh, chunk: int = CHUNK
) -> tuple[Float[np.ndarray, ' W'], float]:
  """Each window's total NLL in nats (float64), and the cache's bytes per token slot."""
  length = windows.mask.shape[1]
  batch = BATCH + -BATCH % mesh.size
  place = NamedSharding(mesh, PartitionSpec(sharding.RULES['B']))
  cache = jax.device_put(
    model_lib.allocate_cache(model, batch=batch, slots=length, dtype=cache_dtype), place
  )
  bytes_per_token = cache.bytes_per_token()
  graphdef, params = nnx.split(model)

  def score(params, cache: cache_lib.Cache, tokens: Int[Array, 'B window']):
    model = nnx.merge(graphdef, params)
    cache = cache_lib.Cache(cache.layers, jnp.zeros_like(cache.lengths))
    parts = []
    for start in range(0, length, chunk):
      end = min(start + chunk, length)
      logits, cache = model_lib.decode(model, cache, tokens[:, start:end])
      targets = tokens[:, start + 1 : end + 1]
      parts.append(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    return jnp.concatenate(parts, axis=1), cache

  score = jax.jit(score, donate_argnums=1)
  totals = []
  for start in range(0, len(windows.tokens), batch):
    tokens = windows.tokens[start : start + batch]
    fill = ((0, batch - len(tokens)), (0, 0))
    with jax.set_mesh(mesh):
      nll, cache = score(params, cache, jax.device_put(np.pad(tokens, fill), place))
    rows = np.asarray(nll, np.float64)[: len(tokens)]
    totals.append(np.sum(rows * windows.mask[start : start + batch], axis=1))
  return np.concatenate(totals), bytes_per_token


def bootstrap_perplexity(
  nll: Float[np.ndarray, ' W'], targets: Int[np.ndarray, ' W'], resamples: int = BOOTSTRAPS
) -> list[float] | None:
  """The 95 % percentile interval [low, high] of exp(sum nll / sum targets) over windows.

  None of fewer than LEAST_WINDOWS windows.
  """
  if len(nll) < LEAST_WINDOWS:
    return None
  rng = np.random.default_rng(0)
  means = []
  for _ in range(resamples):
    drawn = rng.integers(0, len(nll), len(nll))
    means.append(nll[drawn].sum() / targets[drawn].sum())
  return [float(bound) for bound in np.exp(np.percentile(means, [2.5, 97.5]))]
