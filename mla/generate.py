"""A trained run writes text: what generate.py does, one token at a time, so that each is seen as
it comes.

All a run needs for it lies in its workdir: config.json, a checkpoint, and tokenizer.model if it has
subwords. Its corpus is not read, if its tokenizer is there.
"""

import codecs
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from mla import backends, memory, sharding
from mla import cache as cache_lib
from mla import model as model_lib
from mla.attention import nested
from mla.cutting import cut_latent
from mla.data.pipeline import load_tokenizer
from mla.data.tokenizers import Tokenizer
from mla.errors import UserError
from mla.evaluate import latent_widths, load_model
from mla.workdir import read_config

MULTIPLE = 32  # prompts are padded to it, so that those of about a length share their programs


class Run(NamedTuple):
  """A trained run, ready to be used, on one device."""

  config: ConfigDict
  tokenizer: Tokenizer
  model: model_lib.Decoder
  step: int


class Written(NamedTuple):
  """What the writing of a batch of rows took."""

  tokens: int  # of all rows
  first_seconds: float  # until the first was there, compilation included
  rest_seconds: float  # for the steps after the second, before which there was compilation
  rest_steps: int
  rest_tokens: int  # of those steps; rows that have ended give none
  rows: int
  steps: int
  cache_bytes: int
  cache_bytes_per_token: float


def load(workdir: Path, latent_dim: int | None = None) -> Run:
  """The newest checkpoint's model with its tokenizer, a nested latent cut to latent_dim.

  UserError as eval.py's.
  """
  config = read_config(workdir)
  (width, *_) = latent_widths(workdir, config, latent_dim)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  try:
    backends.check(config.attention_impl, mesh)
  except UserError:  # it was for the devices that trained it
    config.attention_impl = 'auto'
  tokenizer = load_tokenizer(workdir, config)
  model, step = load_model(
    workdir, config, tokenizer.vocab_size, None, mesh, tokenizer=tokenizer.digest
  )
  if width and nested.widths_of(config):
    model, config = cut_latent(model, config, width)
  return Run(config, tokenizer, model, step)


def check(steps: int, temperature: float, top_p: float, cache_dtype: str, batch: int) -> None:
  """Raises UserError for what no text can be written with."""
  rules = (
    ('steps', steps, steps > 0, 'must be at least 1'),
    ('temperature', temperature, 0 <= temperature < float('inf'), 'must be 0 or more, and finite'),
    ('top_p', top_p, 0 < top_p <= 1, 'must be above 0 and at most 1'),
    ('batch', batch, batch > 0, 'must be at least 1'),
  )
  for name, value, holds, cure in rules:
    if not holds:
      raise UserError(f'--{name}={value}: {cure}')
  if cache_dtype not in cache_lib.DTYPES:
    raise UserError(f'--cache_dtype={cache_dtype}: choose one of {", ".join(cache_lib.DTYPES)}')


def write(
  run: Run,
  prompts: Sequence[str],
  say: Callable[[int, str], None],
  *,
  steps: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  cache_dtype: str = 'bfloat16',
  seed: int = 0,
) -> Written:
  """Continues the prompts side by side by up to `steps` tokens each; say(row, text) as it comes.

  Each starts a document. A row ends early where the model begins another document.
  """
  encoded = [np.append(run.tokenizer.bos, run.tokenizer.encode(prompt)) for prompt in prompts]
  lengths = np.array([len(ids) for ids in encoded], np.int32)
  width = int(lengths.max() + -lengths.max() % MULTIPLE)
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, ids in enumerate(encoded):
    tokens[row, : len(ids)] = ids
  _check_memory(run, cache_dtype, rows=len(prompts), slots=width + steps)
  began = time.monotonic()
  cache = model_lib.allocate_cache(
    run.model, batch=len(prompts), slots=width + steps, dtype=cache_dtype
  )
  sizes = cache.nbytes(), cache.bytes_per_token()
  decoders = [codecs.getincrementaldecoder('utf-8')(errors='replace') for _ in prompts]
  open_rows = set(range(len(prompts)))
  done, rest_tokens, times = 0, 0, []
  key = jax.random.key(seed, impl=model_lib.PRNG)
  drawn = stream(
    run.model, cache, tokens, lengths, key,
    steps=steps, temperature=temperature, top_p=top_p,
  )  # fmt: skip
  for newest in drawn:
    times.append(time.monotonic())
    for row in sorted(open_rows):
      token = int(newest[row])
      if token == run.tokenizer.bos:
        open_rows.remove(row)
        continue
      done += 1
      rest_tokens += len(times) > 2
      say(row, decoders[row].decode(run.tokenizer.raw(newest[row : row + 1])))
    if not open_rows:
      break
  for row, decoder in enumerate(decoders):
    say(row, decoder.decode(b'', final=True))
  rest_seconds = times[-1] - times[1] if len(times) > 2 else 0.0
  return Written(
    done, times[0] - began, rest_seconds, len(times[2:]), rest_tokens, len(prompts), steps, *sizes
  )


def stream(
  model: model_lib.Decoder,
  cache: cache_lib.Cache,
  prompts: Int[np.ndarray, 'B T'],
  lengths: Int[np.ndarray, ' B'],
  key: Key[Array, ''],
  *,
  steps: int,
  temperature: float,
  top_p: float,
) -> Iterator[Int[np.ndarray, ' B']]:
  """model.generate's tokens, one a row at a time. From the second on the next are under way when
  these are given."""
  how = {'temperature': temperature, 'top_p': top_p}
  first_key, key = jax.random.split(key)
  token, cache = _first(model, cache, jnp.asarray(prompts), jnp.asarray(lengths), first_key, **how)
  yield np.asarray(token)  # shown before the program for the others is compiled
  if steps == 1:
    return
  second_key, *keys = jax.random.split(key, steps - 1)
  token, cache = _next(model, cache, token, second_key, **how)
  for step_key in keys:
    following, cache = _next(model, cache, token, step_key, **how)
    yield np.asarray(token)
    token = following
  yield np.asarray(token)


@functools.partial(jax.jit, static_argnames=('temperature', 'top_p'), donate_argnums=1)
def _first(model, cache, prompts, lengths, key, *, temperature: float, top_p: float):
  logits, cache = model_lib.prefill(model, cache, prompts, lengths)
  return model_lib.sample(logits, key, temperature=temperature, top_p=top_p), cache


@functools.partial(jax.jit, static_argnames=('temperature', 'top_p'), donate_argnums=1)
def _next(model, cache, token, key, *, temperature: float, top_p: float):
  logits, cache = model_lib.decode(model, cache, token[:, None])
  return model_lib.sample(logits[:, 0], key, temperature=temperature, top_p=top_p), cache


def card(run: Run, written: Written, cache_dtype: str) -> str:
  """What it took, on two lines."""
  speed = '' if not written.rest_tokens or not written.rest_seconds else (
    f'{1e3 * written.rest_seconds / written.rest_steps:.2f} ms a token, '
    f'{written.rest_tokens / written.rest_seconds:,.0f} tokens a second; '
  )  # fmt: skip
  rows = '' if written.rows == 1 else f' in {written.rows} rows'
  return (
    f'{written.tokens:,} tokens{rows}: {speed}the first after {written.first_seconds:.1f} s\n'
    f'KV cache, {cache_dtype}: {written.cache_bytes:,} bytes, '
    f'{written.cache_bytes_per_token:,.0f} a token'
  )


def _check_memory(run: Run, cache_dtype: str, *, rows: int, slots: int) -> None:
  """Raises UserError if it surely cannot be had."""
  sized = run.config.copy_and_resolve_references()
  sized.seq_len = slots
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  memory.check_reading(sized, cache_dtype, mesh, batch=rows, chunk=1)
