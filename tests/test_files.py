"""Files are replaced whole, never through a link; what cannot be read is told in one line."""

import errno
import os
import subprocess
import sys

import pytest

from mla import files
from mla.errors import MachineError, UserError


def test_a_link_is_replaced_and_not_followed(tmp_path):
  target, link = tmp_path / 'thesis.tex', tmp_path / 'config.json'
  target.write_text('ten years of work')
  link.symlink_to(target)
  files.write_whole(link, 'new')
  assert target.read_text() == 'ten years of work'
  assert link.read_text() == 'new' and not link.is_symlink()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / 'results.jsonl'
  path.write_text('whole')

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError):
    files.write_whole(path, 'half')
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('results.jsonl', 'whole')]


def test_a_full_disk_is_the_machines_failure_and_a_denied_folder_the_users():
  full = files.cannot('a: cannot be written', OSError(errno.ENOSPC, 'x'), 'choose another')
  denied = files.cannot('a: cannot be written', OSError(errno.EACCES, 'denied'), 'choose another')
  assert isinstance(full, MachineError) and 'no space' in str(full)
  assert isinstance(denied, UserError) and str(denied).endswith('choose another')


def test_a_draft_is_known_by_its_name(tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', killed)
  monkeypatch.setattr(type(tmp_path), 'unlink', lambda _: None)
  with pytest.raises(KeyboardInterrupt):
    files.write_whole(tmp_path / 'a', 'x')
  (left,) = tmp_path.iterdir()
  assert files.is_draft(left)
  assert not files.is_draft(tmp_path / 'notes.draft')


@pytest.mark.parametrize(
  'content', [b'', b'{"a": ', b'\xff\xfe', b'[' * 100_000, b'\0\0\0'], ids=lambda c: repr(c[:8])
)
def test_what_is_no_json_is_named_with_its_cure(tmp_path, content):
  path = tmp_path / 'config.json'
  path.write_bytes(content)
  with pytest.raises(UserError, match='config.json: is not whole JSON .*; restore it'):
    files.read_json(path, 'restore it')


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  for name in ('folder', 'pipe'):
    with pytest.raises(UserError, match=f'{name}: is not a regular file; restore it'):
      files.read_bytes(tmp_path / name, 'restore it')
  with pytest.raises(UserError, match='none: cannot be read .*; restore it'):
    files.read_bytes(tmp_path / 'none', 'restore it')


HOLDER = """
import sys, time
from pathlib import Path
from mla import files
with files.lease(Path(sys.argv[1]), 'busy'):
  print('held', flush=True)
  time.sleep(60)
"""


def test_a_lease_keeps_others_out_until_its_holder_dies(tmp_path):
  path = tmp_path / '.lock'
  with subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE, text=True
  ) as holder:
    assert holder.stdout is not None and holder.stdout.readline() == 'held\n'
    with (
      pytest.raises(UserError, match='somebody is at work'),
      files.lease(path, 'somebody is at work'),
    ):
      pass
    holder.kill()
  with files.lease(path, 'somebody is at work'):
    pass


def test_a_lock_that_is_a_link_is_refused(tmp_path):
  (tmp_path / '.lock').symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='is a link'), files.lease(tmp_path / '.lock', 'busy'):
    pass
  assert not (tmp_path / 'elsewhere').exists()


@pytest.mark.parametrize(
  ('error', 'number'),
  [
    (OSError(errno.ENOSPC, 'No space'), errno.ENOSPC),
    (PermissionError(errno.EACCES, 'denied'), errno.EACCES),
    (FileNotFoundError(errno.ENOENT, 'none'), None),
    (MemoryError(), errno.ENOMEM),
    (ValueError("Failed to write: File too large [os_error_code='27']"), errno.EFBIG),
    (ValueError('Failed to open [OS error 24: EMFILE Too many open files]'), errno.EMFILE),
    (RuntimeError('RESOURCE_EXHAUSTED: out of memory'), errno.ENOMEM),
    (ExceptionGroup('many', [ValueError('x'), OSError(errno.EDQUOT, 'quota')]), errno.EDQUOT),
    (ValueError('whatever'), None),
  ],
  ids=lambda value: repr(value)[:50],
)
def test_what_the_system_refused_is_found_behind_a_librarys_error(error, number):
  for told in (error, wrapped(error), wrapped(wrapped(error))):
    found = files.refusal(told)
    assert (found and found.errno) == number


def wrapped(error: Exception) -> Exception:
  """As a library tells it."""
  try:
    raise RuntimeError('the checkpoint could not be written') from error
  except RuntimeError as found:
    return found
