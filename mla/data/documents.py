"""A split's documents as they are read: in a fixed order, one at a time, never all in memory."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from mla import terminal
from mla.errors import UserError

# A document as UTF-8. Of a large file it is a part of the mapped file, so look, don't keep.
Raw = bytes | memoryview

MB = 10**6
PIECE = 2**22  # bytes of a document that are tokenized at once


class Documents:
  """Reads a split's documents anew each time it is iterated.

  `stamps` change where the source does, so they tell without reading whether it is the same.
  `nbytes` is its size on disk, in both splits where they share it; text may be longer or shorter.
  Iterating raises UserError for what can't be read, or, if all of it is white space, `empty`.
  """

  def __init__(
    self,
    read: Callable[['Documents'], Iterator[Raw]],
    *,
    stamps: list,
    nbytes: int,
    empty: str,
  ):
    self._read = read
    self._empty = empty
    self.stamps = stamps
    self.nbytes = nbytes
    self.consumed = 0  # bytes of the source behind the reader, which sets it now and then

  def __iter__(self) -> Iterator[Raw]:
    self.consumed = 0
    some = False
    for raw in self._read(self):
      some = some or not is_blank(raw)
      yield raw
    if not some:
      raise UserError(self._empty)

  def parts(self, doing: str) -> Generator[tuple[int, Raw], None, None]:
    """parts() of all documents, while `doing` says to people how far they are."""
    progress = terminal.Progress(self.nbytes // MB, f'{doing}, MB')
    told = behind = 0
    try:
      for size, part in parts(self):
        yield size, part
        behind += len(part)
        # Within the first file only the text tells, which is longer than a compressed source.
        at = min(self.consumed or behind, self.nbytes) // MB
        if at > told:
          progress.move(at - told)
          told = at
    finally:
      progress.close()


def stamp(path: Path) -> list:
  """A file's name, its size, and what changes when it is written to; zeros if it can't be seen."""
  try:
    found = path.stat()
    return [str(path.absolute()), found.st_size, found.st_mtime_ns]
  except OSError:  # reading will say what is wrong
    return [str(path.absolute()), 0, 0]


def is_blank(raw: Raw) -> bool:
  """Whether a document is white space only."""
  if re.search(b'[!-~]', raw[:256]):  # nearly always
    return False
  return not str(raw, 'utf-8').strip()


def pieces(raw: Raw) -> Iterator[Raw]:
  """A document in parts of at most PIECE bytes, cut after a line's end or else a space.

  Nearly every document is one part. Where it is cut a pretrained tokenizer may divide words
  differently than in one go; bytes and the BPE trained here never do after a line's end.
  """
  start = 0
  while len(raw) - start > PIECE:
    part = bytes(raw[start : start + PIECE])
    end = part.rfind(b'\n') + 1 or part.rfind(b' ') + 1 or PIECE
    while raw[start + end] & 0xC0 == 0x80:  # not within a letter
      end -= 1
    yield part[:end]
    start += end
  if start < len(raw) or not len(raw):
    yield raw[start:]


def parts(documents: Iterable[Raw]) -> Iterator[tuple[int, Raw]]:
  """The pieces of all of them, each with the bytes of the document it begins, or else -1."""
  for raw in documents:
    size = len(raw)
    for piece in pieces(raw):
      yield size, piece
      size = -1


class Digest:
  """A hash of documents and where each ends, taken as they come."""

  def __init__(self):
    self._total = hashlib.sha256()

  def begin(self, nbytes: int) -> None:
    self._total.update(nbytes.to_bytes(8, 'big'))

  def add(self, raw: Raw) -> None:
    self._total.update(raw)

  def hexdigest(self) -> str:
    return self._total.hexdigest()


def digest(documents: Iterable[Raw]) -> str:
  """The Digest of all of them."""
  total = Digest()
  for raw in documents:
    total.begin(len(raw))
    total.add(raw)
  return total.hexdigest()
