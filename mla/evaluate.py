"""Perplexity read through the KV cache, and what that cache costs.

The protocol, so that anybody can repeat it:

- Text: the run's validation split, each document as BOS and its tokens, all concatenated.
- Windows of seq_len + 1 tokens at stride seq_len: every token but the stream's first is the target
  of exactly one prediction, document starts (BOS) among them. A token sees those before it in its
  window, across document boundaries, and nothing else. The last window may be shorter.
- Of a run with data.packing=documents a token sees only those of its own document, from the BOS it
  begins with or the window's start on. Windows and targets are the same: the BOS behind a document
  is predicted from that document alone, as its end.
- Each window starts with an empty cache in the asked dtype and is fed in chunks of CHUNK tokens.
  A chunk is first written to the cache and then attends to what the cache gives back, its own
  tokens included: no key, value or latent is ever seen but through the cache. Computation is in the
  run's dtype, softmax and log-likelihoods in float32.
- perplexity = exp(total NLL / targets). bits_per_byte = total NLL in nats / (ln 2 * UTF-8 bytes of
  the targets' text; BOS has none).
- perplexity_ci95: percentile bootstrap, 2,000 resamples of whole windows (tokens of a window are
  not independent), seed 0. It says how far another text of this kind would move the figure, not
  another training seed. None (null) of fewer than 20 windows, of which it would say too little.
- kv_cache_bytes_per_token: nbytes of the arrays allocated for the windows over their token slots;
  kv_cache_bytes_per_token_per_device: of the part of them that one device holds.
- A probe (mla/probes.py) has no text: its windows are those that are held out, its targets those
  that it asks for, and bits_per_byte is None (null). accuracy is the share of targets that got the
  largest logit, accuracy_ci95 as perplexity_ci95, bits_recalled as mla/probes.py says.
- loss_by_position: nats a target, by how many tokens its prediction sees: 1, 2 to 3, 4 to 7, ...
- loss_by_bigram: nats a target, of those that stood earlier in what they see behind the same token
  ('seen'), where a cache can help beyond what text is like in general, and of the rest ('new'); of
  text only.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mla import backends, breakdown, hosts, memory, probes, sharding, terminal
from mla import cache as cache_lib
from mla import config as config_lib
from mla import model as model_lib
from mla.attention import VARIANTS, nested
from mla.checkpoint import Checkpoints
from mla.cutting import cut_latent, cut_layers
from mla.data.pipeline import EvalWindows, TokenStream, eval_windows, load_run_data
from mla.errors import UserError
from mla.windows import are_text, inputs_and_targets
from mla.workdir import read_config

CHUNK = 64
BATCH = 32


class Reading(NamedTuple):
  """What reading windows through their cache gives; sums of NLL in nats, float64."""

  by_window: Float[np.ndarray, ' W']
  by_position: Float[np.ndarray, ' T']  # by how many tokens it sees, from 1 on
  seen: float  # of the targets whose bigram stood earlier in what they see
  right: Int[np.ndarray, ' W']  # targets that got the largest logit; 0 of text, where none looks
  bytes_per_token: float
  bytes_per_token_per_device: float


def evaluate_run(
  workdir: Path,
  cache_dtype: str,
  say: Callable[[str], None] = lambda line: None,
  max_tokens: int | None = None,
) -> dict:
  """One run's newest checkpoint on its validation split; the keys of eval.py's JSON.

  Over several processes (hosts.join) each calls this, and the other functions here, alike.
  Raises UserError for a folder that holds no run, a damaged checkpoint, or a text that is not the
  one it was trained beside.
  """
  return score_run(workdir, cache_dtype, say, max_tokens)[0]


def evaluate_caches(
  workdir: Path,
  cache_dtypes: Sequence[str],
  say: Callable[[str], None] = lambda line: None,
  max_tokens: int | None = None,
  latent_dim: int | None = None,
  layer_dims: Sequence[int] | None = None,
) -> list[dict]:
  """evaluate_run through a cache of each dtype; text and weights are read once.

  A nested run's through one of each width, or of latent_dim alone, or of layer_dims[i] in layer i;
  UserError if those are none of the run's.
  """
  scores = _scores(workdir, cache_dtypes, say, max_tokens, latent_dim, layer_dims)
  return [figures for figures, _ in scores]


def score_run(
  workdir: Path,
  cache_dtype: str,
  say: Callable[[str], None] = lambda line: None,
  max_tokens: int | None = None,
) -> tuple[dict, Float[np.ndarray, ' W']]:
  """evaluate_run's figures, and each window's total NLL in nats.

  With max_tokens: on about so many targets in whole windows, evenly spread over the split.
  """
  return next(_scores(workdir, [cache_dtype], say, max_tokens))


def score_widths(
  workdir: Path, cache_dtype: str, max_tokens: int | None = None
) -> list[tuple[dict, Float[np.ndarray, ' W']]]:
  """score_run's, and behind it those of each narrower width of a nested latent."""
  return list(_scores(workdir, [cache_dtype], lambda line: None, max_tokens))


def _scores(
  workdir: Path,
  cache_dtypes: Sequence[str],
  say: Callable[[str], None],
  max_tokens: int | None,
  latent_dim: int | None = None,
  layer_dims: Sequence[int] | None = None,
) -> Iterator[tuple[dict, Float[np.ndarray, ' W']]]:
  """score_run's for each dtype, and of a nested latent each width, the whole first."""
  for cache_dtype in cache_dtypes:
    if cache_dtype not in cache_lib.DTYPES:
      raise UserError(f'--cache_dtype={cache_dtype}: choose one of {", ".join(cache_lib.DTYPES)}')
  if max_tokens is not None and max_tokens < 1:
    raise UserError(f'--max_tokens={max_tokens}: must be a positive number of tokens')
  config = read_config(workdir)
  cuts: Sequence[int | tuple[int, ...] | None] = latent_widths(workdir, config, latent_dim)
  if layer_dims is not None:
    cuts = [check_layers(workdir, config, layer_dims)]
  widest = max(cache_dtypes, key=lambda dtype: jnp.dtype(dtype).itemsize)
  mesh = memory.reading_mesh(config, widest, batch=BATCH, chunk=CHUNK)
  memory.check_reading(config, widest, mesh, batch=BATCH + -BATCH % mesh.size, chunk=CHUNK)
  try:
    backends.check(config.attention_impl, mesh)
  except UserError:  # it was for the devices that trained it
    config.attention_impl = 'auto'
  data = load_run_data(workdir, config)
  hosts.check_same('data.*: text and tokenizer', data.digest)
  whole, step = load_model(workdir, config, data.tokenizer.vocab_size, data.digest, mesh)
  windows = eval_windows(data.validation, seq_len=config.seq_len, max_tokens=max_tokens)
  targets = windows.mask.sum(axis=1)
  text_bytes = 0  # of a probe
  if not isinstance(data.tokenizer, probes.Symbols):
    text_bytes = np.sum(data.tokenizer.byte_lengths[windows.tokens[:, 1:]] * windows.mask)
  for cache_dtype, cut in itertools.product(cache_dtypes, cuts):
    model, layers = whole, None
    if isinstance(cut, tuple):
      model, layers = cut_layers(whole, config, cut), list(cut)
    elif cut and nested.widths_of(config):
      model = cut_latent(whole, config, cut)[0]
    total, body = model_lib.count_params(model)
    latent = f', {layers or cut} of the latent' if layers or len(cuts) > 1 else ''
    say(f'{workdir}: {windows.mask.sum():,} targets, {cache_dtype} cache{latent}')
    read = read_through_cache(model, windows, cache_dtype, mesh)
    nll = read.by_window
    yield (
      {
        'workdir': str(workdir),
        'attention': config.attention,
        'latent_dim': None if layers else cut,
        'layer_dims': layers,
        'params_total': total,
        'params_non_embedding': body,
        'step': step,
        'cache_dtype': cache_dtype,
        'kv_cache_bytes_per_token': read.bytes_per_token,
        'kv_cache_bytes_per_token_per_device': read.bytes_per_token_per_device,
        'perplexity': float(np.exp(nll.sum() / targets.sum())),
        'perplexity_ci95': breakdown.bootstrap_perplexity(nll, targets),
        'bits_per_byte': float(nll.sum() / (math.log(2) * text_bytes)) if text_bytes else None,
        'tokens_evaluated': int(targets.sum()),
        'data_digest': data.digest[:16],
        'loss_by_position': breakdown.loss_by_position(
          read.by_position, breakdown.by_tokens_seen(windows.mask, windows.starts)
        ),
        **what_was_asked(data.validation, read, windows),
      },
      nll,
    )


def latent_widths(
  workdir: Path, config: ConfigDict, latent_dim: int | None = None
) -> Sequence[int | None]:
  """The widths of the latents that the run's cache can have, the whole first; [None] without any.

  With latent_dim that one alone, UserError if it is none of them.
  """
  own = 'latent_dim' in VARIANTS[config.attention].fields
  widths = (nested.widths_of(config) or (config.latent_dim,))[::-1] if own else (None,)
  if latent_dim is None:
    return widths
  if latent_dim not in widths:
    told = ', '.join(str(width) for width in widths) if own else f'none, {config.attention}'
    raise UserError(
      f'--latent_dim={latent_dim}: {workdir} has {told}; a run that can be cut is trained with '
      'nested=8,16,32'
    )
  return (latent_dim,)


def parse_layers(text: str) -> list[int]:
  """The widths that --layer_dims=64,32,16,8 names; UserError if they are none."""
  if not re.fullmatch(r'[0-9]{1,9}(,[0-9]{1,9})*', text):
    raise UserError(f'--layer_dims={text}: write a width for each layer, such as 64,32,16,8')
  return [int(width) for width in text.split(',')]


def check_layers(workdir: Path, config: ConfigDict, dims: Sequence[int]) -> tuple[int, ...]:
  """A width for each layer; UserError if one is none of the run's, or there are not as many."""
  given = f'--layer_dims={",".join(map(str, dims))}'
  if len(dims) != config.num_layers:
    raise UserError(f'{given}: {workdir} has {config.num_layers} layers; give each a width')
  widths = nested.widths_of(config)
  if not set(dims) <= set(widths):
    told = ', '.join(map(str, widths)) or 'none'
    raise UserError(
      f'{given}: {workdir} can be cut to {told}; a run that can is trained with nested=8,16,32'
    )
  return tuple(dims)


def load_model(
  workdir: Path,
  config: ConfigDict,
  vocab: int,
  data: str | None,
  mesh: Mesh,
  *,
  tokenizer: str | None = None,
) -> tuple[model_lib.Decoder, int]:
  """The newest checkpoint's model, on the mesh as in training, and its step.

  `data` and `tokenizer` are digests of what it is to be used with; None is not compared.
  Raises UserError as Checkpoints.read_params.
  """
  model = nnx.eval_shape(lambda: model_lib.make_model(config, vocab))
  graphdef, params = nnx.split(model)
  target = sharding.placed(params, sharding.shardings(params, mesh))
  used = {'config': config_lib.to_json(config), 'data': data, 'tokenizer': tokenizer}
  step, params = Checkpoints(workdir).read_params(target, used)
  return nnx.merge(graphdef, params), step


def read_through_cache(
  model: model_lib.Decoder, windows: EvalWindows, cache_dtype: str, mesh: Mesh, chunk: int = CHUNK
) -> Reading:
  """Each window's total NLL, that by tokens seen, and the cache's bytes per token slot.

  Windows lie on data and fsdp; where they are fewer than devices, the cache's slots do. Over
  several processes each is given all windows, reads those of its devices, and gets all sums.
  """
  count, length = windows.mask.shape
  devices = math.prod(mesh.shape[axis] for axis in sharding.RULES['B'])
  graphdef, params = nnx.split(model)
  batch = min(BATCH, count)
  batch += -batch % devices
  if count < devices and length % devices == 0:
    batch = count
    model = nnx.merge(graphdef, params)
    for attention in model.attentions():
      attention.impl = 'blockwise'  # which XLA can split along the slots
    graphdef = nnx.graphdef(model)

  def empty():
    cache = model_lib.allocate_cache(model, batch=batch, slots=length, dtype=cache_dtype)
    return cache.layers

  place = cache_lib.shardings(jax.eval_shape(empty), batch, mesh)
  layers = jax.jit(empty, out_shardings=place)()
  rows = sharding.rows_sharding(mesh) if batch % devices == 0 else sharding.everywhere(mesh)

  score = make_score(graphdef, mesh, place, chunk)
  by_window, by_position, seen, right = [], np.zeros(length), 0.0, []
  progress = None
  if hosts.is_first():
    progress = terminal.Progress(-(-count // batch), f'{cache_dtype} cache')

  def put(array: np.ndarray | None) -> Array | None:
    if array is None:
      return None
    return jax.make_array_from_callback(array.shape, rows, array.__getitem__)

  for start in range(0, count, batch):
    part = windows.take(np.arange(start, start + batch))
    with jax.set_mesh(mesh):
      (nll, hits), layers = score(params, layers, put(part.tokens), put(part.starts))
    real = hosts.whole(nll).astype(np.float64) * part.mask
    by_window.append(real.sum(axis=1)[: count - start])
    hits = np.zeros_like(part.mask) if hits is None else hosts.whole(hits)
    right.append((hits & part.mask).sum(axis=1)[: count - start])
    by_position += breakdown.by_tokens_seen(real, part.starts)
    if are_text(part.tokens):
      seen += float(real[breakdown.bigrams_seen(part.tokens, part.starts)].sum())
    if progress is not None:
      progress.move()
  if progress is not None:
    progress.close()
  cache = cache_lib.Cache(layers, jnp.zeros(batch, jnp.int32))
  return Reading(
    np.concatenate(by_window),
    by_position,
    seen,
    np.concatenate(right),
    cache.bytes_per_token(),
    cache.bytes_per_token_per_device(),
  )


def make_score(graphdef, mesh: Mesh, place, chunk: int):
  """The compiled function (params, a cache's layers, windows, their starts [B,T] or None) ->
  ((NLL, hits) [B,T], the layers).

  hits, of a probe's windows, tells where a target got the largest logit; it is None of text's, and
  where a window has no target both say nothing. The cache is read and written in one loop over
  chunks, its layers lying where `place` says.
  """

  def score(params, layers, windows: Int[Array, 'B window *row'], starts: backends.Starts = None):
    def read(cache: cache_lib.Cache, tokens: tuple[Array, Array, backends.Starts]):
      weights = params
      if mesh.shape['fsdp'] > 1:  # else all of them would be gathered before the loop, and held
        weights, tokens = jax.lax.optimization_barrier((params, tokens))
      inputs, targets, starts = tokens
      logits, cache = model_lib.decode(nnx.merge(graphdef, weights), cache, inputs, starts)
      hits = None if are_text(windows) else jnp.argmax(logits, axis=-1) == targets
      targets = targets if hits is None else jnp.maximum(targets, 0)
      nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      layers = jax.lax.with_sharding_constraint(cache.layers, place)
      return cache_lib.Cache(layers, cache.lengths), (nll, hits)

    tokens = (*inputs_and_targets(windows), starts)
    batch, length = tokens[1].shape
    cache = cache_lib.Cache(layers, jnp.zeros(batch, jnp.int32))
    whole, parts = length // chunk, []
    if whole:
      each = np.arange(whole)[:, None] * chunk + np.arange(chunk)
      chunks = jax.tree.map(lambda x: x[:, each].swapaxes(0, 1), tokens)
      cache, found = jax.lax.scan(read, cache, chunks)
      parts.append(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1), found))
    if length % chunk:
      cache, found = read(cache, jax.tree.map(lambda x: x[:, whole * chunk :], tokens))
      parts.append(found)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts), cache.layers

  return jax.jit(score, donate_argnums=1, out_shardings=(None, place))


def what_was_asked(
  stream: TokenStream | probes.Stream, read: Reading, windows: EvalWindows
) -> dict[str, Any]:
  """Of text its loss by what stood before; of a probe its sizes, accuracy and bits recalled."""
  if not isinstance(stream, probes.Stream):
    seen = int(np.sum(breakdown.bigrams_seen(windows.tokens, windows.starts) & windows.mask))
    nll, targets = float(read.by_window.sum()), int(windows.mask.sum())
    return {'loss_by_bigram': breakdown.loss_by_bigram(read.seen, nll, seen, targets)}
  probe, targets = stream.probe, windows.mask.sum(axis=1)
  accuracy = float(read.right.sum() / targets.sum())
  return {
    'probe': probe.name,
    'records': probe.records,
    'attributes': probe.attributes,
    'alphabet': probe.alphabet,
    'bits_held': probe.bits_held(),
    'guessing': 1 / probe.answers,
    'accuracy': accuracy,
    'accuracy_ci95': breakdown.bootstrap_mean(read.right, targets),
    'bits_recalled': probe.bits_recalled(accuracy),
  }
