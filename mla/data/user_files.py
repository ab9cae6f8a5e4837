"""A user's own files: which ones a pattern means, what they hold, and what is held out.

What counts as text: UTF-8, byte for byte as it stands, Windows line ends included. Only a byte
order mark at a file's start is left out, and so are files that are empty or hold white space only.
A NUL byte is refused: it is the sign of UTF-16 or of a binary file. A file counts once, however
many links name it, and may be larger than the memory. Files of records have rules of their own
(records.py).
"""

import codecs
import errno
import fnmatch
import functools
import glob
import logging
import mmap
import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mla import files
from mla.data import records
from mla.data.documents import Documents, Raw, is_blank, stamp
from mla.errors import UserError

BLOCK = 2**22  # bytes of a file that are looked at at once
SHORTEST = 20  # characters of a text of which something is held out


def open_files(data: ConfigDict, split: str) -> Documents:
  """The documents of 'train' or 'validation', by path.

  A text file is one; a file of records (records.py) has many. Validation is data.validation_files,
  or else the last tenth of each text file and every tenth record of the others. Raises UserError,
  one line that names the field and the file, for whatever cannot be read as text.
  """
  held_out = not data.validation_files
  if not held_out:
    _check_apart(data)
  name = 'files' if split == 'train' or held_out else 'validation_files'
  field, pattern = f'data.{name}', data[name]
  paths = matches(field, pattern)
  stamps = [stamp(path) for path in paths]

  def read(documents: Documents) -> Iterator[Raw]:
    behind, some = 0, False
    for path, (_, size, _) in zip(paths, stamps, strict=True):
      _check_file(field, path)
      if records.is_records(path):

        def told(at: int, behind: int = behind) -> None:
          documents.consumed = behind + at

        for number, raw in enumerate(records.read(field, path, data.text_key, told)):
          if raw is not None:
            some = True
            if not held_out or (number % 10 == 9) == (split == 'validation'):
              yield raw
      else:
        raw = _text(field, path, split if held_out else '')
        if raw is not None:
          some = True
          if len(raw):
            yield raw
      behind += size
      documents.consumed = behind
    if not some:
      raise UserError(f'{field}={pattern}: what matches holds no text; choose another')

  empty = (
    f'data.files={data.files}: the last tenths of what matches hold no text (one of less than '
    f'{SHORTEST} characters has none, and fewer than ten records have); take more, or name '
    'data.validation_files'
  )
  nbytes = sum(size for _, size, _ in stamps)
  what = [split if held_out else '', data.text_key]
  return Documents(read, stamps=[what, *stamps], nbytes=nbytes, empty=empty)


def _check_apart(data: ConfigDict) -> None:
  train = set(map(_file, matches('data.files', data.files)))
  for path in matches('data.validation_files', data.validation_files):
    if _file(path) in train:
      raise UserError(
        f'data.validation_files={data.validation_files}: matches {path}, which data.files matches '
        'too; a text is for one of them'
      )


def cut(raw: Raw, characters: int) -> int:
  """How many bytes of a text of so many characters are trained on; the last tenth is held out.

  The cut is after the last line end that leaves 10 to 15 % of the characters (rounded down) behind
  it; else after the last white space that does; else at 10 %. Never between \\r and \\n. A text of
  less than SHORTEST characters is trained on whole.
  """
  if characters < SHORTEST:
    return len(raw)
  tenth = _offset(raw, characters - characters // 10)
  if raw[tenth - 1 : tenth + 1] == b'\r\n':
    tenth -= 1
  first = _offset(raw, characters - characters * 15 // 100 - 1)
  for end in range(tenth, first, -BLOCK):
    start = max(first, end - BLOCK)
    line_end = bytes(raw[start:end]).rfind(b'\n') + 1
    if line_end:
      return start + line_end
  region = str(raw[first:tenth], 'utf-8')
  spaces = (place for place in range(len(region), 0, -1) if region[place - 1].isspace())
  last = next(spaces, 0)
  return first + len(region[:last].encode()) if last else tenth


def _offset(raw: Raw, index: int) -> int:
  """The byte at which the character `index` begins."""
  seen = 0
  for start in range(0, len(raw), BLOCK):
    begins = np.frombuffer(raw[start : start + BLOCK], np.uint8) & 0xC0 != 0x80
    count = int(np.count_nonzero(begins))
    if seen + count > index:
      return start + int(np.flatnonzero(begins)[index - seen])
    seen += count
  return len(raw)


def matches(field: str, pattern: str) -> list[Path]:
  """The files that a pattern means, sorted, each once. What exists under its literal name is taken
  literally: `[a].txt` is that file where there is one, and a pattern below a folder `[2024]` works.

  As glob has it, a name with a dot in front must be asked for. `**` enters a linked folder too, but
  every folder once, so a link that leads in a circle ends. UserError if nothing is found; folders
  that may not be read are warned of.
  """
  literal = files.local_path(field, pattern)
  top = Path(literal.anchor)
  closed: dict[Path, str] = {}
  found: dict[Hashable, Path] = {}
  for path in sorted(_expand(top, literal.relative_to(top).parts, closed), key=str):
    found.setdefault(_file(path), path)
  if closed:
    folder, reason = next(iter(closed.items()))
    trouble = f'{len(closed)} folder(s) cannot be looked into, {folder} the first ({reason})'
    if not found:
      raise UserError(f'{field}={pattern}: no file matches, and {trouble}; make it readable')
    _warn(f'{field}={pattern}: {trouble}; nothing of it is read')
  if not found:
    raise UserError(f'{field}={pattern}: no file matches; quote the pattern and check the path')
  return list(found.values())


@functools.cache  # once, however often the files are looked for
def _warn(message: str) -> None:
  logging.warning('%s', message)


def _file(path: Path) -> Hashable:
  """What is the same for all names of a file."""
  try:
    found = path.stat()
    return found.st_dev, found.st_ino
  except OSError:
    return path  # a link to nothing, say; reading will tell


def _expand(folder: Path, parts: Sequence[str], closed: dict[Path, str]) -> Iterator[Path]:
  """What the pattern `parts` means in a folder; adds those to `closed` that may not be read."""
  if not parts:
    yield folder
    return
  part, *rest = parts
  try:
    os.lstat(folder / part)
    literal = True
  except OSError as error:
    literal = False
    if error.errno == errno.EACCES:
      closed[folder] = os.strerror(errno.EACCES)
      return
  if literal:
    yield from _expand(folder / part, rest, closed)
  elif part == '**':
    while rest[:1] == ['**']:
      rest = rest[1:]
    for below in _folders(folder, closed):
      yield from _expand(below, rest, closed)
  elif glob.escape(part) != part:
    for name in _names(folder, closed):
      if fnmatch.fnmatchcase(name, part) and (name[0] != '.' or part[0] == '.'):
        yield from _expand(folder / name, rest, closed)


def _folders(folder: Path, closed: dict[Path, str]) -> Iterator[Path]:
  """A folder and those below it, without hidden ones, each once."""
  seen: set[Hashable] = set()
  waiting = [folder]
  for place in waiting:  # grows on the way
    if _file(place) in seen:
      continue
    seen.add(_file(place))
    yield place
    below = (place / name for name in _names(place, closed) if name[0] != '.')
    waiting += filter(os.path.isdir, below)


def _names(folder: Path, closed: dict[Path, str]) -> list[str]:
  try:
    return sorted(os.listdir(folder))
  except OSError as error:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
      closed[folder] = os.strerror(error.errno or 0)
    return []


def _text(field: str, path: Path, part: str) -> Raw | None:
  """A text file, or that part of it; None of one that is white space only."""
  raw = _content(field, path)
  if raw[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8:
    raw = raw[len(codecs.BOM_UTF8) :]
    before = len(codecs.BOM_UTF8)
  else:
    before = 0
  characters = _count_characters(field, path, raw, before)
  if is_blank(raw):
    return None
  end = cut(raw, characters) if part else len(raw)
  return raw[end:] if part == 'validation' else raw[:end]


def _check_file(field: str, path: Path) -> None:
  if os.path.isdir(path):
    raise UserError(f'{field}: {path} is a folder; for the files in it write {path / "*.txt"}')
  if os.path.islink(path) and not os.path.exists(path):
    raise UserError(f'{field}: {path} is a link to nothing; remove it or leave it out')
  if path.exists() and not path.is_file():
    raise UserError(f'{path}: is not a regular file; leave it out of {field}')


def _content(field: str, path: Path) -> memoryview:
  """A file's bytes; those of a large one stay on disk."""
  cure = f'make it readable or leave it out of {field}'
  try:
    large = path.stat().st_size > BLOCK
    if large:
      with open(path, 'rb') as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  except OSError as error:
    raise files.cannot(f'{path}: cannot be read', error, cure) from error
  return memoryview(files.read_bytes(path, cure))


def _count_characters(field: str, path: Path, raw: Raw, before: int) -> int:
  """How many there are; UserError unless it is UTF-8 without NUL, `before` bytes lying before."""
  count, decoder = 0, codecs.getincrementaldecoder('utf-8')()
  for start in range(0, max(len(raw), 1), BLOCK):
    block = bytes(raw[start : start + BLOCK])
    if b'\0' in block:
      place = before + start + block.index(0)
      raise UserError(
        f'{field}: {path} holds a NUL byte at {place}, so it is UTF-16 or no text; convert it '
        'to UTF-8 or leave it out'
      )
    pending = len(decoder.getstate()[0])
    try:
      count += len(decoder.decode(block, final=start + BLOCK >= len(raw)))
    except UnicodeDecodeError as error:
      place = start - pending + error.start
      raise UserError(
        f'{field}: {path} is not UTF-8 at byte {place}; convert it (iconv -t UTF-8)'
      ) from error
  return count
