"""Tokens to batches, through Grain: deterministic, resumable, the same on any number of hosts."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
import sentencepiece
from jaxtyping import Bool, Int, Integer
from ml_collections import ConfigDict

from mla import files
from mla.data import corpora, token_files, tokenizers
from mla.data.documents import Documents, Raw, digest
from mla.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer, make_tokenizer
from mla.errors import UserError

SMALL = 2**26  # bytes of text that are read at each start, where a token is a byte
MODEL = 'tokenizer.model'  # SentencePiece's, in a store


class TokenStream(NamedTuple):
  """Every document as BOS and its tokens, one after another."""

  tokens: Integer[np.ndarray, ' n']


class Data(NamedTuple):
  tokenizer: Tokenizer
  train: TokenStream
  validation: TokenStream
  digest: str  # identifies both streams
  place: str  # where the tokens are, for people


class EvalWindows(NamedTuple):
  tokens: Int[np.ndarray, 'W window']  # seq_len + 1 wide
  mask: Bool[np.ndarray, 'W T']  # the targets that are real


def load_data(config: ConfigDict, stopping: Callable[[], bool] = lambda: False) -> Data:
  """The tokenizer and both streams that config.data names; UserError if they cannot be had.

  A small text in bytes is read into memory; all else is prepared once as token files and opened.
  Raises token_files.Stopped if stopping() while they are made.
  """
  sources = {split: corpora.open_documents(config.data, split) for split in token_files.SPLITS}
  spec = config.data.tokenizer
  small = sum(source.nbytes for source in sources.values()) <= SMALL
  if spec == 'bytes' and small:
    return _read(sources, ByteTokenizer())
  tokenizer: Tokenizer | None = None
  if not spec.startswith('bpe:'):
    tokenizer = make_tokenizer(spec, [], Path())
  identity = f'{spec} {sentencepiece.__version__}' if tokenizer is None else tokenizer.digest
  root = corpora.data_dir(config.data)
  what = [identity, *(source.stamps for source in sources.values())]
  folder = token_files.folder_of(root, what)
  store = token_files.find(folder)
  if store is not None and tokenizer is None:
    tokenizer = BpeTokenizer(files.read_bytes(folder / MODEL, f'remove {folder}'))
  if store is None:
    tokenizer = tokenizer or make_tokenizer(spec, sources['train'], root / 'mla_tokenizers')
    extra = {MODEL: tokenizer.model} if isinstance(tokenizer, BpeTokenizer) else {}
    try:
      store = token_files.make(folder, sources, tokenizer, extra, stopping)
    except UserError as error:  # where nothing can be kept
      if not small:
        raise
      logging.warning('%s; it is tokenized anew at every start', error)
      return _read(sources, tokenizer)
  assert tokenizer is not None
  _tell_doubled(store.manifest['doubled'], store.manifest['splits']['validation']['documents'])
  digests = {split: store.manifest['splits'][split]['digest'] for split in token_files.SPLITS}
  return _data(tokenizer, store.tokens, digests, f'in {folder}')


def _read(sources: dict[str, Documents], tokenizer: Tokenizer) -> Data:
  """A small text's tokens in memory."""
  documents = {split: list(source) for split, source in sources.items()}
  seen = set(documents['train'])
  held_out = documents['validation']
  _tell_doubled(sum(document in seen for document in held_out), len(held_out))
  tokens = {split: make_stream(found, tokenizer) for split, found in documents.items()}
  digests = {split: digest(found) for split, found in documents.items()}
  return _data(tokenizer, tokens, digests, 'in memory, read at each start')


def _data(
  tokenizer: Tokenizer, tokens: dict[str, np.ndarray], digests: dict[str, str], place: str
) -> Data:
  train, validation = (TokenStream(tokens[split]) for split in token_files.SPLITS)
  parts = (*(digests[split] for split in token_files.SPLITS), tokenizer.digest)
  total = hashlib.sha256(' '.join(parts).encode()).hexdigest()
  return Data(tokenizer, train, validation, total, place)


def _tell_doubled(doubled: int, documents: int) -> None:
  if doubled:
    logging.warning(
      'data: %d of %d validation documents are training documents too; those judge memory',
      doubled,
      documents,
    )


def load_run_data(workdir: Path, config: ConfigDict) -> Data:
  """load_data of a run, with the tokenizer.json it keeps: that of its config may have moved."""
  own = workdir / tokenizers.HUGGING_FACE[0]
  if config.data.tokenizer.startswith('hf:') and own.exists():
    config = config.copy_and_resolve_references()
    config.data.tokenizer = f'hf:{own}'
  return load_data(config)


def load_tokenizer(workdir: Path, config: ConfigDict) -> Tokenizer:
  """The run's own, or else what load_data makes of its text."""
  own = tokenizers.load(config.data.tokenizer, workdir)
  return load_data(config).tokenizer if own is None else own


def make_stream(documents: list[Raw], tokenizer: Tokenizer) -> Integer[np.ndarray, ' n']:
  """The tokens of documents one after another, each behind BOS."""
  bos = np.array([tokenizer.bos])
  parts = [part for raw in documents for part in (bos, tokenizer.encode(str(raw, 'utf-8')))]
  return np.concatenate(parts, dtype=token_files.dtype_of(tokenizer.vocab_size), casting='unsafe')


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
  batches = order.batch(batch_size).map(lambda indices: views[indices[mine]].astype(np.int32))
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
  chosen = np.arange(count)
  if max_tokens is not None and max_tokens < targets:
    chosen = np.linspace(0, count - 1, max(1, max_tokens // seq_len)).astype(int)
  tokens = np.zeros((len(chosen), seq_len + 1), np.int32)
  mask = np.zeros((len(chosen), seq_len), bool)
  for row, window in enumerate(chosen):
    found = stream.tokens[window * seq_len : (window + 1) * seq_len + 1]
    tokens[row, : len(found)] = found
    mask[row, : len(found) - 1] = True
  return EvalWindows(tokens, mask)
