"""Checksums of a folder's files, by which damage is proved rather than guessed.

SHA256SUMS is what `sha256sum --check SHA256SUMS` reads, with a first line that counts the others.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from mla import files

NAME = 'SHA256SUMS'
# What the system says where there is nothing, or what is no file: a folder, a link, a pipe.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL)


def write(folder: Path, parts: Iterable[str]) -> None:
  """Writes folder/SHA256SUMS over all files in these subfolders; OSError if that fails."""
  lines = [
    f'{_sum(path)}  {path.relative_to(folder)}\n'
    for part in parts
    for path in _files_below(folder / part)
  ]
  files.write_whole(folder / NAME, f'# {len(lines)} files\n' + ''.join(lines))


def difference(folder: Path, parts: Iterable[str]) -> str | None:
  """The first proof that these subfolders are not as they were written; None if there is none.

  Where there is no SHA256SUMS nothing can be compared, but every file is read. Raises OSError if a
  file that is there can't be read: that proves nothing.
  """
  wanted = tuple(f'{part}/' for part in parts)
  try:
    with _open(folder / NAME) as file:
      lines = file.read().decode(errors='replace').split('\n')
  except FileNotFoundError:
    for part in wanted:
      for path in _files_below(folder / part):
        _sum(path)
    return None
  except OSError as error:
    if error.errno not in NO_FILE:
      raise
    return f'{NAME} is no file'
  if lines[0] != f'# {len(lines) - 2} files' or lines[-1]:
    return f'{NAME} is not whole'
  for line in lines[1:-1]:
    found = re.fullmatch(r'([0-9a-f]{64})  (\S.*)', line)
    if found is None:
      return f'{NAME} is not whole'
    total, name = found.groups()
    if not name.startswith(wanted):
      continue
    try:
      if _sum(folder / name) != total:
        return f'{name} differs from its checksum'
    except OSError as error:
      if error.errno not in NO_FILE:
        raise
      return f'{name} is missing'
  return None


def _files_below(folder: Path) -> list[Path]:
  """Every file, in order; OSError where a folder can't be listed."""

  def unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
      raise error

  return sorted(
    Path(root, name) for root, _, names in os.walk(folder, onerror=unreadable) for name in names
  )


def _sum(path: Path) -> str:
  with _open(path) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _open(path: Path) -> BufferedReader:
  return os.fdopen(files.open_regular(path, os.O_RDONLY), 'rb')
