"""Tokens to batches, through Grain: deterministic, resumable, the same on any number of hosts."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from mla.data import corpora, tokenizers
from mla.data.tokenizers import Tokenizer, make_tokenizer
from mla.errors import UserError


class TokenStream(NamedTuple):
  """Every document as BOS and its tokens, one after another."""

  tokens: Int[np.ndarray, ' n']


class Data(NamedTuple):
  tokenizer: Tokenizer
  train: TokenStream
  validation: TokenStream
  digest: str  # identifies both streams


class EvalWindows(NamedTuple):
  tokens: Int[np.ndarray, 'W window']  # seq_len + 1 wide
  mask: Bool[np.ndarray, 'W T']  # the targets that are real


def load_data(config: ConfigDict) -> Data:
  """The tokenizer and both streams that config.data names; UserError if they cannot be had."""
  train, validation = (corpora.load_documents(config.data, s) for s in ('train', 'validation'))
  seen = set(train)
  if doubled := sum(document in seen for document in validation):
    logging.warning(
      'data: %d of %d validation documents are training documents too; those judge memory',
      doubled,
      len(validation),
    )
  spec = config.data.tokenizer
  # The others need no folder, so one that cannot be used is no obstacle.
  trained = spec.startswith('bpe:')
  folder = corpora.data_dir(config.data) / 'mla_tokenizers' if trained else Path()
  tokenizer = make_tokenizer(spec, train, folder)
  parts = (corpora.digest(train), corpora.digest(validation), tokenizer.digest)
  return Data(
    tokenizer,
    make_stream(train, tokenizer),
    make_stream(validation, tokenizer),
    hashlib.sha256(' '.join(parts).encode()).hexdigest(),
  )


def load_tokenizer(workdir: Path, config: ConfigDict) -> Tokenizer:
  """The run's own, or else what load_data makes of its text."""
  own = tokenizers.load(config.data.tokenizer, workdir)
  return load_data(config).tokenizer if own is None else own


def make_stream(documents: list[str], tokenizer: Tokenizer) -> TokenStream:
  bos = np.array([tokenizer.bos], np.int32)
  return TokenStream(
    np.concatenate([part for text in documents for part in (bos, tokenizer.encode(text))])
  )


def train_batches(
  stream: TokenStream,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  rows: Int[np.ndarray, ' b'] | None = None,
) -> grain.DatasetIterator:
  """Endless batches of windows, int32 [batch_size, seq_len + 1], or of each only these `rows`.

  Windows lie at stride seq_len and are shuffled anew each epoch. A batch's row is the same window
  whatever process reads it, so the position is a single number, the batches taken, whatever the
  number of processes and the mesh.
  """
  count = (len(stream.tokens) - 1) // seq_len
  if count < batch_size:
    raise UserError(
      f'batch_size={batch_size}: the training text has only {max(count, 0)} windows of '
      f'seq_len={seq_len}; take more text, or lower one of them'
    )
  views = np.lib.stride_tricks.sliding_window_view(stream.tokens, seq_len + 1)[::seq_len]
  order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
  mine = slice(None) if rows is None else rows
  batches = order.batch(batch_size).map(lambda indices: views[indices[mine]])
  # The text is in memory: threads would only cost.
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def skip_to(batches: grain.DatasetIterator, taken: int) -> None:
  """Sets train_batches' position to where `taken` batches have been taken."""
  batches.set_state({'next_index': taken})


def eval_windows(
  stream: TokenStream, *, seq_len: int, max_tokens: int | None = None
) -> EvalWindows:
  """Windows in which every token but the first is a target exactly once; the last is padded.

  With max_tokens: about that many targets in whole windows, evenly spread.
  """
  targets = len(stream.tokens) - 1
  if targets < 1:
    raise UserError('data: the validation text holds no token to predict; take more text')
  count = -(-targets // seq_len)
  padded = np.zeros(count * seq_len + 1, np.int32)
  padded[: targets + 1] = stream.tokens
  tokens = np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]
  mask = (np.arange(count * seq_len) < targets).reshape(count, seq_len)
  if max_tokens is not None and max_tokens < targets:
    chosen = np.linspace(0, count - 1, max(1, max_tokens // seq_len)).astype(int)
    return EvalWindows(tokens[chosen], mask[chosen])
  return EvalWindows(tokens, mask)
