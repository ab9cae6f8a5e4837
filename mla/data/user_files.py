"""A user's own text files: which ones a pattern means, what they hold, and what is held out.

What counts as text: UTF-8, byte for byte as it stands, Windows line ends included. Only a byte
order mark at a file's start is left out, and so are files that are empty or hold white space only.
A NUL byte is refused: it is the sign of UTF-16 or of a binary file. A file counts once, however
many links name it.
"""

import codecs
import errno
import fnmatch
import functools
import glob
import logging
import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mla import files
from mla.errors import UserError

SHORTEST = 20  # characters of a text of which something is held out


def load(data: ConfigDict, split: str) -> list[str]:
  """The texts of 'train' or 'validation', by path; those without any are left out.

  Validation is data.validation_files, or else the last tenth of each of data.files. Raises
  UserError, one line that names the field and the file, for whatever cannot be read as text.
  """
  if data.validation_files:
    _check_apart(data)
    name = 'files' if split == 'train' else 'validation_files'
    return _read_all(f'data.{name}', data[name])
  parts = [split_text(text) for text in _read_all('data.files', data.files)]
  chosen = [train if split == 'train' else held_out for train, held_out in parts]
  if not any(map(str.strip, chosen)):
    raise UserError(
      f'data.files={data.files}: the last tenths of what matches hold no text (one of less than '
      f'{SHORTEST} characters has none); take more, or name data.validation_files'
    )
  return [text for text in chosen if text]


def _check_apart(data: ConfigDict) -> None:
  train = set(map(_file, matches('data.files', data.files)))
  for path in matches('data.validation_files', data.validation_files):
    if _file(path) in train:
      raise UserError(
        f'data.validation_files={data.validation_files}: matches {path}, which data.files matches '
        'too; a text is for one of them'
      )


def split_text(text: str) -> tuple[str, str]:
  """What to train on, and the last tenth, which is held out; together they are the text.

  The cut is after the last line end that leaves 10 to 15 % of the characters (rounded down) behind
  it; else after the last white space that does; else at 10 %. Never between \\r and \\n. A text of
  less than SHORTEST characters is trained on whole.
  """
  if len(text) < SHORTEST:
    return text, ''
  least, most = len(text) // 10, len(text) * 15 // 100
  tenth = len(text) - least
  if text[tenth - 1 : tenth + 1] == '\r\n':
    tenth -= 1
  first = len(text) - most
  line_end = text.rfind('\n', first - 1, tenth) + 1
  if line_end:
    return text[:line_end], text[line_end:]
  spaces = (place for place in range(tenth, first - 1, -1) if text[place - 1].isspace())
  cut = next(spaces, tenth)
  return text[:cut], text[cut:]


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


def _read_all(field: str, pattern: str) -> list[str]:
  texts = [text for path in matches(field, pattern) if (text := _read(field, path)).strip()]
  if not texts:
    raise UserError(f'{field}={pattern}: what matches holds no text; choose another')
  return texts


def _read(field: str, path: Path) -> str:
  if os.path.isdir(path):
    raise UserError(f'{field}: {path} is a folder; for the files in it write {path / "*.txt"}')
  if os.path.islink(path) and not os.path.exists(path):
    raise UserError(f'{field}: {path} is a link to nothing; remove it or leave it out')
  raw = files.read_bytes(path, f'make it readable or leave it out of {field}')
  if b'\0' in raw:
    raise UserError(
      f'{field}: {path} holds a NUL byte at {raw.index(0)}, so it is UTF-16 or no text; convert it '
      'to UTF-8 or leave it out'
    )
  try:
    return raw.removeprefix(codecs.BOM_UTF8).decode()
  except UnicodeDecodeError as error:
    raise UserError(f'{field}: {path} is not UTF-8 at byte {error.start}; convert it') from error
