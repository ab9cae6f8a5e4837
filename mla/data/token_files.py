"""Tokens on disk, made once and then mapped into memory, whatever the size of the text.

A store is a folder of data.data_dir/mla_tokens. For `train` and `validation` it has SPLIT.tokens
(all documents' tokens, each after BOS, in the smallest dtype that holds the vocabulary) and
SPLIT.documents (a row a document: the number of its first token, its bytes). Written last is
manifest.json: what it was made of, counts, and hashes of text, tokenizer and files. Without a
manifest that its files fit, a store is made again.

While it is made, SPLIT.journal says how far the files are good: a preparation that was killed reads
the text again, for its hash, and goes on with tokens from there. Nothing depends on how often that
happens or on the number of cores.
"""

import array
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from mla import files, signals
from mla.data import bpe
from mla.data.documents import Digest, Documents, Raw
from mla.data.tokenizers import Tokenizer
from mla.errors import MachineError, UserError

MANIFEST, LOCK = 'manifest.json', '.lock'
FORMAT = 2  # of the files; another one is another store
BATCH = 2**22  # bytes of text that are tokenized between two lines of the journal
SPLITS = ('train', 'validation')
ROW = np.dtype([('token', '<u8'), ('bytes', '<u8')])  # of SPLIT.documents
KINDS = ('tokens', 'documents')
NOTHING = {'pieces': 0, 'documents': 0, 'tokens': 0, 'bytes': 0, 'digest': ''}


class NotKept(UserError):
  """Where the tokens are to lie nothing can be written."""


class Store(NamedTuple):
  tokens: dict[str, np.ndarray]  # by split, mapped
  documents: dict[str, np.ndarray]  # likewise the number of each one's first token
  manifest: dict[str, Any]


def folder_of(root: Path, what: list) -> Path:
  """The store for a source, a tokenizer and their settings: `what` tells all of them."""
  name = hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()
  return root / 'mla_tokens' / name[:16]


def find(folder: Path) -> Store | None:
  """The store if it is there and whole; else None, with a warning where it is damaged.

  Files are compared with their hashes where their times are not those that the manifest noted:
  what changed on disk without the system's knowledge, no start looks for.
  """
  if not (folder / MANIFEST).exists():
    return None
  try:
    manifest = files.read_json(folder / MANIFEST, '')
    changed = False
    for name, noted in manifest['files'].items():
      found = (folder / name).stat()
      if [found.st_size, found.st_mtime_ns] != [noted['bytes'], noted['time']]:
        changed = True
        if found.st_size != noted['bytes'] or _hash(folder / name) != noted['sha256']:
          raise ValueError(f'{name} is not what was written')
        noted['time'] = found.st_mtime_ns
    if changed:
      with contextlib.suppress(OSError):  # a store that can only be read is whole too
        files.write_whole(folder / MANIFEST, _as_json(manifest))
    tokens = {split: _map(folder, split, manifest) for split in SPLITS}
    return Store(tokens, {split: _map_documents(folder, split) for split in SPLITS}, manifest)
  except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    logging.warning('%s: the prepared tokens are damaged (%s); they are made again', folder, error)
    return None


def make(
  folder: Path,
  sources: Mapping[str, Documents],
  make_tokenizer: Callable[[], Tokenizer],
  stopping: Callable[[], bool] = lambda: False,
) -> Store:
  """Makes the store, or waits for the process that does.

  make_tokenizer() is called where this one does, in the folder, which is there by then. Raises
  signals.Stopped if stopping(), NotKept where nothing can be written, UserError for what is wrong
  with the text.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as until_the_end:
      _wait_for(folder, stopping, until_the_end)
      store = find(folder)
      if store is not None:
        return store
      _remove_refused(folder)
      tokenizer = make_tokenizer()
      splits = {
        split: _Split(folder, split, tokenizer, documents, stopping).write()
        for split, documents in sources.items()
      }
      _write_manifest(folder, splits, tokenizer)
      for split in SPLITS:
        (folder / f'{split}.journal').unlink(missing_ok=True)
  except OSError as error:
    doing = f'data.data_dir: tokens cannot be kept in {folder}'
    failure = files.cannot(doing, error, 'choose a folder with room')
    raise NotKept(str(failure)) if isinstance(failure, UserError) else failure from error
  store = find(folder)
  if store is None:
    raise MachineError(f'{folder}: what was written there cannot be read back; mend that')
  return store


def _wait_for(
  folder: Path, stopping: Callable[[], bool], until_the_end: contextlib.ExitStack
) -> None:
  """Holds the folder's lock until then; Stopped if stopping() before it is free."""
  busy = f'{folder}: another process is preparing the tokens'
  lease = files.lease(folder / LOCK, busy, waiting=lambda: not stopping())
  try:
    until_the_end.enter_context(lease)
  except UserError as error:
    if stopping():
      raise signals.Stopped from error
    raise NotKept(str(error)) from error


def _remove_refused(folder: Path) -> None:
  """Removes a store that find() refused, the journals first: they would vouch for its files.

  Files are removed and not written over, for somebody may have mapped them.
  """
  if os.path.lexists(folder / MANIFEST):
    names = [f'{split}.{kind}' for kind in ('journal', *KINDS) for split in SPLITS]
    for name in [*names, MANIFEST]:
      (folder / name).unlink(missing_ok=True)


def tokens_of(
  parts: list[Raw], sizes: list[int], tokenizer: Tokenizer
) -> tuple[Integer[np.ndarray, ' n'], list[int]]:
  """The parts' tokens behind one another, and where documents begin, each with a BOS.

  `sizes` as documents.parts() has them: -1 of a part that begins no document.
  """
  bos = np.array([tokenizer.bos])
  begins = [size >= 0 for size in sizes]
  found, starts, count = [], [], 0
  for ids, first in zip(tokenizer.encode_batch(parts, begins), begins, strict=True):
    if first:
      starts.append(count)
      found.append(bos)
    found.append(ids)
    count += len(ids) + first
  dtype = dtype_of(tokenizer.vocab_size)
  return np.concatenate(found, dtype=dtype, casting='unsafe'), starts


class _Split:
  """One split's files while they are made."""

  def __init__(
    self,
    folder: Path,
    name: str,
    tokenizer: Tokenizer,
    documents: Documents,
    stopping: Callable[[], bool],
  ):
    self._name, self._tokenizer, self._documents = name, tokenizer, documents
    self._stopping = stopping
    self._journal = folder / f'{name}.journal'
    self._paths = {kind: folder / f'{name}.{kind}' for kind in KINDS}
    self._sizes = {'tokens': dtype_of(tokenizer.vocab_size).itemsize, 'documents': ROW.itemsize}

  def write(self) -> dict[str, Any]:
    """Makes the files, from where the journal says; their counts and hashes."""
    try:
      return self._write()
    except _Changed:
      self._journal.unlink()
      return self._write()

  def _write(self) -> dict[str, Any]:
    with contextlib.ExitStack() as until_the_end:
      self._files = {
        kind: until_the_end.enter_context(os.fdopen(files.open_to_append(path), 'ab'))
        for kind, path in self._paths.items()
      }
      self._done = self._good()
      # Tokens are made and written there, while the text is read and hashed here.
      writer = until_the_end.enter_context(futures.ThreadPoolExecutor(1))
      return self._read(writer)

  def _good(self) -> dict[str, Any]:
    """The last line of the journal that the files bear out; they are cut to what it says."""
    good: dict[str, Any] = NOTHING
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
      for line in self._journal.read_text(encoding='utf-8').splitlines():
        with contextlib.suppress(ValueError):  # cut short by a kill
          found = json.loads(line)
          if isinstance(found, dict) and set(found) == set(good):
            good = found
    for kind, file in self._files.items():
      if os.fstat(file.fileno()).st_size < good[kind] * self._sizes[kind]:
        good = NOTHING
    for kind, file in self._files.items():
      file.truncate(good[kind] * self._sizes[kind])
    return dict(good)

  def _read(self, writer: futures.Executor) -> dict[str, Any]:
    """Reads all of the text and has made what isn't done yet."""
    done = dict(self._done)
    total = Digest()
    count = {'pieces': 0, 'bytes': 0}
    seen = array.array('q')  # of each document a hash
    batch = _Batch([], [])
    waiting = 0
    before = writer.submit(self._hash_done)

    def flush() -> None:
      nonlocal batch, before, waiting
      if batch.parts:
        before.result()
        before = writer.submit(self._append, batch, {**count, 'digest': total.hexdigest()})
        batch = _Batch([], [])
      waiting = 0
      if self._stopping():
        raise signals.Stopped

    with contextlib.closing(self._documents.parts(f'tokens of {self._name}')) as parts:
      for size, part in parts:
        if size >= 0:
          total.begin(size)
          seen.append(0)
        total.add(part)
        seen[-1] = hash((seen[-1], part))
        count['pieces'] += 1
        count['bytes'] += len(part)
        if count['pieces'] > done['pieces']:
          batch.parts.append(part)
          batch.sizes.append(size)
        elif count['pieces'] == done['pieces'] and total.hexdigest() != done['digest']:
          raise _Changed
        waiting += len(part)
        if waiting >= BATCH:
          flush()
      if count['pieces'] < done['pieces']:
        raise _Changed
      flush()
      before.result()
    hashes = {kind: found.hexdigest() for kind, found in self._sums.items()}
    return {**self._done, 'seen': np.array(seen), 'sha256': hashes}

  def _hash_done(self) -> None:
    self._sums = {kind: hashlib.sha256() for kind in KINDS}
    for kind, path in self._paths.items():
      with open(path, 'rb') as file:
        while block := file.read(BATCH):
          self._sums[kind].update(block)

  def _append(self, batch: '_Batch', read: dict[str, Any]) -> None:
    """Writes the tokens of a batch, and then into the journal that they are there."""
    tokens, starts = tokens_of(batch.parts, batch.sizes, self._tokenizer)
    rows = np.empty(len(starts), ROW)
    rows['token'] = np.array(starts, np.uint64) + np.uint64(self._done['tokens'])
    rows['bytes'] = [size for size in batch.sizes if size >= 0]
    for kind, written in (('tokens', tokens), ('documents', rows)):
      file, raw = self._files[kind], written.tobytes()
      file.write(raw)
      self._sums[kind].update(raw)
      file.flush()
      os.fsync(file.fileno())
      self._done[kind] += len(written)
    self._done.update(read)
    with files.append(self._journal) as journal:
      journal.write(json.dumps(self._done) + '\n')


class _Batch(NamedTuple):
  """Parts of documents that are tokenized together, as documents.parts() has them."""

  parts: list[Raw]
  sizes: list[int]


class _Changed(Exception):
  """The text is not that of which the journal tells."""


def _write_manifest(folder: Path, splits: dict[str, dict[str, Any]], tokenizer: Tokenizer) -> None:
  hashes = {
    f'{split}.{kind}': found
    for split, made in splits.items()
    for kind, found in made.pop('sha256').items()
  }
  if (folder / bpe.KEPT).exists():
    hashes[bpe.KEPT] = _hash(folder / bpe.KEPT)
  noted = {}
  for name, sha256 in hashes.items():
    found = (folder / name).stat()
    noted[name] = {'bytes': found.st_size, 'time': found.st_mtime_ns, 'sha256': sha256}
  train, validation = (splits[split].pop('seen') for split in SPLITS)
  manifest = {
    'format': FORMAT,
    'tokenizer': tokenizer.digest,
    'vocabulary': tokenizer.vocab_size,
    'dtype': dtype_of(tokenizer.vocab_size).str,
    # Validation documents that are training documents too.
    'doubled': int(np.isin(validation, train).sum()),
    'splits': splits,
    'files': noted,
  }
  files.write_whole(folder / MANIFEST, _as_json(manifest))


def dtype_of(vocab: int) -> np.dtype:
  """The smallest for so many tokens, little-endian."""
  return next(np.dtype(f'<u{n}') for n in (1, 2, 4) if vocab <= 2 ** (8 * n))


def _map(folder: Path, split: str, manifest: dict[str, Any]) -> Integer[np.ndarray, ' n']:
  return np.memmap(folder / f'{split}.tokens', np.dtype(manifest['dtype']), mode='r')


def _map_documents(folder: Path, split: str) -> Integer[np.ndarray, ' d']:
  return np.memmap(folder / f'{split}.documents', ROW, mode='r')['token'].view(np.ndarray)


def _hash(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _as_json(manifest: dict[str, Any]) -> str:
  return json.dumps(manifest, indent=2) + '\n'
