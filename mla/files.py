"""Files that are written whole or not at all, and read with one clear line where they cannot be.

Nothing here follows a link out of the folder it writes to: a draft is a new file of its own, and
taking its place replaces a link instead of writing to what the link names.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import filelock

from mla.errors import MachineError, UserError, causes

# What no other path or value would cure: the machine lacks space, handles or memory.
EXHAUSTED = {
  errno.ENOSPC: 'no space is left',
  errno.EDQUOT: 'the disk quota is used up',
  errno.EFBIG: 'the limit on a file size is reached',
  errno.EMFILE: 'the limit on open files is reached',
  errno.ENFILE: 'the limit on open files is reached',
  errno.ENOMEM: 'there is too little memory',
  errno.EIO: 'the disk reports an error',
  errno.ESTALE: 'the folder has gone',
}


def cannot(doing: str, error: OSError, cure: str) -> UserError | MachineError:
  """The error to raise where the system refused: the machine's failure, or the user's to cure."""
  if error.errno in EXHAUSTED:
    return MachineError(f'{doing}: {EXHAUSTED[error.errno]}; mend that, then run the same again')
  return UserError(f'{doing} ({error.strerror or error}); {cure}')


REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)  # what the user has to permit


def refusal(error: BaseException) -> OSError | None:
  """What the system refused behind an error that some library raised; None if it was nothing.

  Only what another try can mend: rights, space, handles, memory. Libraries in C++ tell it as text.
  """
  for cause in causes(error):
    told = re.search(r"(OS error |\[Errno |os_error_code=')(\d+)", str(cause))
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None and told:
      number = int(told[2])
    if number is None and (isinstance(cause, MemoryError) or 'RESOURCE_EXHAUSTED' in str(cause)):
      number = errno.ENOMEM
    if number in EXHAUSTED or number in REFUSALS:
      return OSError(number, os.strerror(number))
  return None


def write_all(descriptor: int, content: bytes) -> None:
  """Writes every byte; a disk that takes only some of them raises."""
  while content:
    content = content[os.write(descriptor, content) :]


def unused(path: Path) -> Path:
  """`path`, or if that is taken the first of path-2, path-3, ... that is not."""
  names = itertools.chain([path], (path.with_name(f'{path.name}-{n}') for n in itertools.count(2)))
  return next(name for name in names if not os.path.lexists(name))


def local_path(name: str, given: str) -> Path:
  """A path as a user writes it, `~` and `~user` expanded; UserError that names the flag or field.

  A bucket's address is refused: to the system it would be a folder called `gs:`.
  """
  if '\0' in given:
    raise UserError(f'{name}={given}: no path has a NUL character in it; choose another')
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', given):
    raise UserError(f'{name}={given}: not a path; mount it as a folder (gs:// with gcsfuse)')
  try:
    return Path(given).expanduser()
  except RuntimeError as error:  # no such user, or one without a home
    raise UserError(f'{name}={given}: no home folder is known for that ~; write it out') from error


def write_whole(path: Path, content: bytes | str) -> None:
  """Replaces `path` in one step; raises OSError with what was there left as it was.

  A link at `path` is replaced, not followed. Several processes may write the same path at once.
  """
  raw = content.encode() if isinstance(content, str) else content
  draft = path.with_name(f'.{secrets.token_hex(8)}.draft')
  try:
    # O_EXCL: never what somebody put there, be it a file or a link.
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, 'wb') as file:
      file.write(raw)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
  except BaseException:
    with contextlib.suppress(OSError):
      draft.unlink()
    raise


def write_json(path: Path, content: Any) -> None:
  """Writes what --json=PATH asked for; what cannot be written ends in one line."""
  try:
    write_whole(path, json.dumps(content, indent=2) + '\n')
  except OSError as error:
    raise cannot(f'--json={path}: cannot be written', error, 'choose another') from error


def open_regular(path: Path, flags: int) -> int:
  """A descriptor; OSError if the path is a link, or no regular file."""
  # O_NONBLOCK: a pipe is refused instead of waited for.
  descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, 'is not a regular file')
  return descriptor


def open_to_append(path: Path) -> int:
  """A descriptor that writes at the file's end, which is made if need be; as open_regular."""
  return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def append(path: Path) -> TextIO:
  """open_to_append as text; a character that UTF-8 has no bytes for is written out."""
  return os.fdopen(open_to_append(path), 'a', encoding='utf-8', errors='backslashreplace')


def is_draft(path: Path) -> bool:
  """Whether this is what a process killed in write_whole leaves behind."""
  return re.fullmatch(r'\.[0-9a-f]{16}\.draft', path.name) is not None


def read_bytes(path: Path, cure: str) -> bytes:
  """A regular file's bytes; UserError that names it, and ends with the cure, if they can't be had.

  A pipe or a device, which might never end, is refused. MachineError if memory can't hold it.
  """
  try:
    if path.exists() and not path.is_file():
      raise UserError(f'{path}: is not a regular file; {cure}')
    return path.read_bytes()
  except OSError as error:
    raise cannot(f'{path}: cannot be read', error, cure) from error
  except MemoryError as error:
    exhausted = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    raise cannot(f'{path}: cannot be read', exhausted, cure) from error


def read_json(path: Path, cure: str) -> Any:
  """A file's JSON; UserError as read_bytes, also for text that is no JSON or nested without end."""
  try:
    return json.loads(read_bytes(path, cure).decode())
  except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
    reason = 'nested too deeply' if isinstance(error, RecursionError) else str(error)
    raise UserError(f'{path}: is not whole JSON ({reason}); {cure}') from error


@contextlib.contextmanager
def lease(path: Path, busy: str, *, waiting: Callable[[], bool] = lambda: False) -> Iterator[None]:
  """Holds the lock file `path`, keeping every other process out; ends however its holder dies.

  Raises UserError `busy` if another holds it, at once or when waiting() is no longer true. `path`
  is no link: what it would name is not ours to make.
  """
  if path.is_symlink():
    raise UserError(f'{path}: is a link, and a lock must be a file of its own; remove it')
  lock = filelock.FileLock(path)
  try:
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      if not waiting():
        raise
      logging.warning('%s: another process holds it; waiting for it to end', path)
      lock.acquire(poll_interval=0.2, cancel_check=lambda: not waiting())
  except filelock.Timeout as error:
    raise UserError(busy) from error
  except OSError as error:
    raise cannot(f'{path}: cannot be locked', error, 'choose another folder') from error
  try:
    yield
  finally:
    lock.release()
