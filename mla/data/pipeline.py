"""Tokens to batches, through Grain: deterministic, resumable, the same on any number of hosts."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer
from ml_collections import ConfigDict

from mla import probes
from mla.data import bpe, corpora, packing, token_files, tokenizers
from mla.data.documents import Documents, Raw, digest, parts
from mla.data.tokenizers import Tokenizer
from mla.errors import UserError
from mla.windows import inputs_and_targets, scored

SMALL = 2**26  # bytes of text that are read at each start, where a token is a byte
MOST_WINDOWS = 2**40  # of a probe, so that no run meets their end


class TokenStream(NamedTuple):
  """Every document as BOS and its tokens, one after another."""

  tokens: Integer[np.ndarray, ' n']
  # Where each document begins, if attention is not to cross from one to another.
  documents: Integer[np.ndarray, ' d'] | None = None

  def amount(self) -> str:
    """How much it is, for people."""
    return f'{len(self.tokens):,} training tokens'


class Data(NamedTuple):
  tokenizer: Tokenizer | probes.Symbols
  train: TokenStream | probes.Stream
  validation: TokenStream | probes.Stream
  digest: str  # identifies both streams
  place: str  # where the tokens are, for people


class Batch(NamedTuple):
  tokens: Int[np.ndarray, 'b window *row']  # as mla/windows.py has them
  starts: Int[np.ndarray, 'b T'] | None  # packing.starts of a stream that has documents


class EvalWindows(NamedTuple):
  tokens: Int[np.ndarray, 'W window *row']  # as mla/windows.py has them
  mask: Bool[np.ndarray, 'W T']  # the targets that are real
  starts: Int[np.ndarray, 'W T'] | None = None  # as Batch's

  def take(self, rows: Int[np.ndarray, ' b']) -> 'EvalWindows':
    """These of the windows; beyond the last there are empty ones, without a target."""
    real = rows < len(self.tokens)

    def taken(array: np.ndarray) -> np.ndarray:
      found = array[np.where(real, rows, 0)]
      found[~real] = 0
      return found

    starts = None if self.starts is None else taken(self.starts)
    return EvalWindows(taken(self.tokens), taken(self.mask), starts)

  def without_padding(self) -> 'EvalWindows':
    """Those that are full, if there are any: what pads the last one is no text to calibrate on."""
    full = np.flatnonzero(self.mask.all(axis=1))
    return self.take(full) if len(full) else self


def load_data(config: ConfigDict, stopping: Callable[[], bool] = lambda: False) -> Data:
  """The tokenizer and both streams that config.data names; UserError if they cannot be had.

  A small text in bytes is read into memory; all else is prepared once as token files and opened.
  Raises signals.Stopped if stopping() while they are made. A probe's windows are made as they are
  read.
  """
  probe = probes.parse(config)
  if probe is not None:
    symbols = probes.symbols(probe)
    train, validation = (probes.Stream(probe, held_out) for held_out in (False, True))
    return Data(symbols, train, validation, symbols.digest, 'made as it is read')
  sources = {split: corpora.open_documents(config.data, split) for split in token_files.SPLITS}
  spec = config.data.tokenizer
  tokenizer = tokenizers.ready(spec)
  apart = config.data.packing == 'documents'
  if spec == 'bytes' and (documents := _small(sources)):
    return _in_memory(documents, tokenizers.ByteTokenizer(), apart)
  what = [tokenizers.identity(spec, tokenizer), *(source.stamps for source in sources.values())]
  folder = token_files.folder_of(corpora.data_dir(config.data), what)

  def made() -> Tokenizer:
    found = tokenizer or bpe.kept(folder)
    if found is None:
      text = (part for _, part in sources['train'].parts(f'text for {spec}'))
      found = bpe.keep(tokenizers.train(spec, text, stopping), folder)
    return found

  try:
    store = token_files.find(folder) or token_files.make(folder, sources, made, stopping)
  except token_files.NotKept as error:
    documents = _small(sources)
    if documents is None:
      raise
    logging.warning('%s; it is tokenized anew at every start', error)
    text = (part for _, part in parts(documents['train']))
    return _in_memory(documents, tokenizer or tokenizers.train(spec, text, stopping), apart)
  tokenizer = tokenizer or bpe.kept(folder)
  if tokenizer is None:
    raise UserError(f'{folder / bpe.KEPT}: is damaged; remove {folder}, it is made again')
  _tell_doubled(store.manifest['doubled'], store.manifest['splits']['validation']['documents'])
  digests = {split: store.manifest['splits'][split]['digest'] for split in token_files.SPLITS}
  streams = {
    split: TokenStream(store.tokens[split], store.documents[split]) for split in token_files.SPLITS
  }
  return _data(tokenizer, streams, digests, f'in {folder}', apart)


def _small(sources: dict[str, Documents]) -> dict[str, list[Raw]] | None:
  """All documents of a text of at most SMALL bytes; None of a larger one."""
  if any(source.nbytes > SMALL for source in sources.values()):  # packed text is longer still
    return None
  documents: dict[str, list[Raw]] = {}
  size = 0
  for split, source in sources.items():
    documents[split] = []
    for raw in source:
      documents[split].append(raw)
      size += len(raw)
      if size > SMALL:
        return None
  return documents


def _in_memory(documents: dict[str, list[Raw]], tokenizer: Tokenizer, apart: bool) -> Data:
  seen = set(documents['train'])
  held_out = documents['validation']
  _tell_doubled(sum(document in seen for document in held_out), len(held_out))
  streams = {split: make_stream(found, tokenizer) for split, found in documents.items()}
  digests = {split: digest(found) for split, found in documents.items()}
  return _data(tokenizer, streams, digests, 'in memory, read at each start', apart)


def _data(
  tokenizer: Tokenizer,
  streams: dict[str, TokenStream],
  digests: dict[str, str],
  place: str,
  apart: bool,
) -> Data:
  """What load_data gives; the streams forget their documents where those are not kept `apart`."""
  train, validation = (
    streams[split] if apart else streams[split]._replace(documents=None)
    for split in token_files.SPLITS
  )
  if apart and train.documents is not None and len(train.documents) == 1:
    logging.warning(
      'data.packing=documents: the training text is one document, so there is nothing to keep '
      'apart; of text files each is one, of .jsonl, .parquet and datasets each record'
    )
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
  """The run's own, or else what load_data makes of its text; UserError for a probe, without any."""
  own = None if probes.asked(config) else tokenizers.load(config.data.tokenizer, workdir)
  return text_tokenizer(config, load_data(config).tokenizer) if own is None else own


def text_tokenizer(config: ConfigDict, tokenizer: Tokenizer | probes.Symbols) -> Tokenizer:
  """The tokenizer; UserError for a probe, which has none."""
  if isinstance(tokenizer, probes.Symbols):
    raise UserError(
      f'data.dataset={config.data.dataset}: a probe has no text; eval.py reads its runs'
    )
  return tokenizer


def make_stream(documents: list[Raw], tokenizer: Tokenizer) -> TokenStream:
  """The tokens of documents one after another, each behind BOS."""
  found, begun, count = [], [], 0
  for size, part in parts(documents):
    tokens, starts = token_files.tokens_of([part], [size], tokenizer)
    found.append(tokens)
    begun += [count + start for start in starts]
    count += len(tokens)
  return TokenStream(np.concatenate(found), np.array(begun))


def window_shape(config: ConfigDict) -> tuple[int, ...]:
  """Of one of train_batches' windows."""
  probe = probes.parse(config)
  return (config.seq_len + 1,) if probe is None else (config.seq_len, probe.parts + 1)


def train_batches(
  stream: TokenStream | probes.Stream,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  rows: Int[np.ndarray, ' b'] | None = None,
) -> grain.DatasetIterator:
  """Endless Batches of windows, int32 [batch_size, seq_len + 1], or of each only these `rows`.

  Windows lie at stride seq_len and are shuffled anew each epoch. A batch's row is the same window
  whatever process reads it, so the position is a single number, the batches taken, whatever the
  number of processes and the mesh. Of a probe they are [batch_size, *row], drawn with this seed.
  """
  mine = slice(None) if rows is None else rows
  if isinstance(stream, probes.Stream):
    numbers = grain.MapDataset.range(MOST_WINDOWS).batch(batch_size)

    def draw(indices: Int[np.ndarray, ' B']) -> Batch:
      return Batch(np.stack([stream.window(int(i), seed) for i in indices[mine]]), None)

    return _in_order(numbers.map(draw))
  count = (len(stream.tokens) - 1) // seq_len
  if count < batch_size:
    raise UserError(
      f'batch_size={batch_size}: the training text has only {max(count, 0)} windows of '
      f'seq_len={seq_len}; take more text, or lower one of them'
    )
  views = np.lib.stride_tricks.sliding_window_view(stream.tokens, seq_len + 1)[::seq_len]
  order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

  def read(indices: Int[np.ndarray, ' B']) -> Batch:
    chosen = indices[mine]
    return Batch(views[chosen].astype(np.int32), _starts(stream, chosen * seq_len, seq_len))

  return _in_order(order.batch(batch_size).map(read))


def _in_order(batches: grain.MapDataset) -> grain.DatasetIterator:
  # All is in memory, or soon made: threads would only cost.
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _starts(
  stream: TokenStream, windows: Int[np.ndarray, ' b'], length: int
) -> Int[np.ndarray, 'b T'] | None:
  return None if stream.documents is None else packing.starts(stream.documents, windows, length)


def skip_to(batches: grain.DatasetIterator, taken: int) -> None:
  """Sets train_batches' position to where `taken` batches have been taken."""
  batches.set_state({'next_index': taken})


def eval_windows(
  stream: TokenStream | probes.Stream, *, seq_len: int, max_tokens: int | None = None
) -> EvalWindows:
  """Windows in which every token but the first is a target exactly once; the last is padded.

  With max_tokens: about that many targets in whole windows, evenly spread.
  """
  if isinstance(stream, probes.Stream):
    count = probes.HELD_OUT
    if max_tokens is not None:
      count = min(count, max(1, max_tokens // stream.probe.queries))
    windows = np.stack([stream.window(index) for index in range(count)])
    return EvalWindows(windows, scored(inputs_and_targets(windows)[1]))
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
  return EvalWindows(tokens, mask, _starts(stream, chosen * seq_len, seq_len))
