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
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from mla import files, terminal
from mla.data.documents import Digest, Documents, pieces
from mla.data.tokenizers import Tokenizer
from mla.errors import MachineError, UserError

MANIFEST, LOCK = 'manifest.json', '.lock'
FORMAT = 1  # of the files; another one is another store
BATCH = 2**22  # bytes of text that are tokenized between two lines of the journal
SPLITS = ('train', 'validation')
ROW = np.dtype([('token', '<u8'), ('bytes', '<u8')])  # of SPLIT.documents
NOTHING = {'pieces': 0, 'documents': 0, 'tokens': 0, 'bytes': 0}
QUIET, BETWEEN = 3, 20  # seconds before anything is said of how far it is, and between two lines


class Stopped(Exception):
  """A signal came while tokens were made; what is made is kept."""


class Store(NamedTuple):
  tokens: dict[str, np.ndarray]  # by split, mapped
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
      files.write_whole(folder / MANIFEST, _as_json(manifest))
    return Store({split: _map(folder, split, manifest) for split in SPLITS}, manifest)
  except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    logging.warning('%s: the prepared tokens are damaged (%s); they are made again', folder, error)
    return None


def make(
  folder: Path,
  sources: Mapping[str, Documents],
  tokenizer: Tokenizer,
  extra: dict[str, bytes],
  stopping: Callable[[], bool] = lambda: False,
) -> Store:
  """Makes the store, or waits for the process that does; `extra` files lie beside it.

  Raises Stopped if stopping(), UserError for what is wrong with the text or the folder.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    busy = f'{folder}: another process is preparing the tokens'
    with files.lease(folder / LOCK, busy, waiting=lambda: not stopping()):
      store = find(folder)
      if store is not None:
        return store
      (folder / MANIFEST).unlink(missing_ok=True)
      for name, content in extra.items():
        files.write_whole(folder / name, content)
      splits = {
        split: _Split(folder, split, tokenizer, documents, stopping).write()
        for split, documents in sources.items()
      }
      _write_manifest(folder, splits, tokenizer, list(extra))
      for split in SPLITS:
        (folder / f'{split}.journal').unlink(missing_ok=True)
  except OSError as error:
    raise files.cannot(
      f'data.data_dir: tokens cannot be kept in {folder}', error, 'choose a folder with room'
    ) from error
  store = find(folder)
  if store is None:
    raise MachineError(f'{folder}: what was written there cannot be read back; mend that')
  return store


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
    self._folder, self._name = folder, name
    self._tokenizer, self._documents, self._stopping = tokenizer, documents, stopping
    self._dtype = dtype_of(tokenizer.vocab_size)
    self._journal = folder / f'{name}.journal'

  def write(self) -> dict[str, Any]:
    """Makes the files, from where the journal says; their counts and the text's hash."""
    with self._open('tokens') as tokens, self._open('documents') as rows:
      try:
        return self._write(self._good(tokens, rows), tokens, rows)
      except _Changed:
        self._journal.unlink()
        return self._write(self._good(tokens, rows), tokens, rows)

  def _open(self, kind: str) -> BinaryIO:
    return os.fdopen(files.open_to_append(self._folder / f'{self._name}.{kind}'), 'ab')

  def _good(self, tokens: BinaryIO, rows: BinaryIO) -> dict[str, Any]:
    """The last line of the journal that the files bear out; they are cut to what it says."""
    good: dict[str, Any] = {**NOTHING, 'digest': ''}
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
      for line in self._journal.read_text(encoding='utf-8').splitlines():
        with contextlib.suppress(ValueError):  # cut short by a kill
          found = json.loads(line)
          if isinstance(found, dict) and set(found) == set(good):
            good = found
    sizes = {tokens: good['tokens'] * self._dtype.itemsize, rows: good['documents'] * ROW.itemsize}
    if any(os.fstat(file.fileno()).st_size < size for file, size in sizes.items()):
      sizes, good = dict.fromkeys(sizes, 0), {**NOTHING, 'digest': ''}
    for file, size in sizes.items():
      file.truncate(size)
    return good

  def _append(
    self,
    texts: list[str],
    starts: list[int],
    count: dict[str, int],
    tokens: BinaryIO,
    rows: BinaryIO,
  ) -> None:
    bos = np.array([self._tokenizer.bos], self._dtype)
    parts, begun = [], []
    for ids, start in zip(self._tokenizer.encode_batch(texts), starts, strict=True):
      if start >= 0:
        begun.append((count['tokens'], start))
        parts.append(bos)
      parts.append(ids)
      count['tokens'] += len(ids) + (start >= 0)
    count['documents'] += len(begun)
    tokens.write(np.concatenate(parts, dtype=self._dtype, casting='unsafe').tobytes())
    rows.write(np.array(begun, np.dtype('<u8')).tobytes())
    for file in (tokens, rows):
      file.flush()
      os.fsync(file.fileno())

  def _write(self, done: dict[str, Any], tokens: BinaryIO, rows: BinaryIO) -> dict[str, Any]:
    total = Digest()
    count = dict(NOTHING)
    seen = array.array('q')
    texts: list[str] = []
    starts: list[int] = []  # of each of them the bytes of the document it begins, or -1
    waiting = 0
    progress = _Progress(self._name, self._documents)

    def flush() -> None:
      nonlocal waiting
      if count['pieces'] > done['pieces'] and texts:
        self._append(texts, starts, count, tokens, rows)
        with files.append(self._journal) as journal:
          journal.write(json.dumps({**count, 'digest': total.hexdigest()}) + '\n')
      texts.clear()
      starts.clear()
      waiting = 0
      progress.show(count['bytes'])
      if self._stopping():
        raise Stopped

    for raw in self._documents:
      total.begin(len(raw))
      identity = 0
      for place, text in enumerate(pieces(raw)):
        encoded = text.encode()
        total.add(encoded)
        identity = hash((identity, text))
        count['pieces'] += 1
        count['bytes'] += len(encoded)
        texts.append(text)
        starts.append(-1 if place else len(raw))
        waiting += len(encoded)
        if count['pieces'] == done['pieces']:
          if total.hexdigest() != done['digest']:
            raise _Changed
          count.update({name: done[name] for name in ('documents', 'tokens')})
          texts.clear()
          starts.clear()
          waiting = 0
        elif waiting >= BATCH:
          flush()
      seen.append(identity)
    if count['pieces'] < done['pieces']:
      raise _Changed
    flush()
    progress.close()
    return {**count, 'digest': total.hexdigest(), 'seen': np.array(seen)}


class _Progress:
  """How far a split is: a bar on a terminal, elsewhere a line now and then; at first nothing."""

  def __init__(self, name: str, documents: Documents):
    self._name, self._documents = name, documents
    self._began = self._told = time.monotonic()
    self._bar: tqdm | None = None

  def show(self, nbytes: int) -> None:
    """`nbytes` of text are behind."""
    now, size = time.monotonic(), max(self._documents.nbytes, 1)
    if now - self._began < QUIET:
      return
    at = min(self._documents.consumed or nbytes, size)
    if sys.stderr.isatty():
      if self._bar is None:
        what = {'desc': f'tokens of {self._name}', 'unit': 'B', 'unit_scale': True}
        self._bar = tqdm(total=size, dynamic_ncols=True, **what)
        self._bar.start_t -= now - self._began
      self._bar.update(at - self._bar.n)
    elif now - self._told > BETWEEN or self._told == self._began:
      self._told = now
      left = terminal.clock((now - self._began) * (size - at) / max(at, 1))
      speed = nbytes / 1e6 / (now - self._began)
      print(
        f'tokens of {self._name}: {100 * at / size:.0f} %, {speed:.1f} MB/s of text, about '
        f'{left} left',
        file=sys.stderr,
        flush=True,
      )

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class _Changed(Exception):
  """The text is not that of which the journal tells."""


def _write_manifest(
  folder: Path, splits: dict[str, dict[str, Any]], tokenizer: Tokenizer, extra: list[str]
) -> None:
  names = [f'{split}.{kind}' for split in SPLITS for kind in ('tokens', 'documents')] + extra
  noted = {}
  for name in names:
    found = (folder / name).stat()
    noted[name] = {
      'bytes': found.st_size,
      'time': found.st_mtime_ns,
      'sha256': _hash(folder / name),
    }
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


def _hash(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _as_json(manifest: dict[str, Any]) -> str:
  return json.dumps(manifest, indent=2) + '\n'
