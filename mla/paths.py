"""A path as a user writes it: made good, or refused in one line before anything is made.

An output never takes the place of what a run or a sweep has written, nor of a file of another kind.
"""

import json
import os
import re
import stat
import unicodedata
from pathlib import Path

from mla import files
from mla.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of nearly every file system; Linux
# Bytes below a workdir that are kept free for what a sweep and Orbax make there: trials/NAME, then
# checkpoints/STEP.orbax-checkpoint-tmp/training/ocdbt.process_0/d/(32 digits).
BELOW = 320

RUN = {'config.json', 'metrics.jsonl', 'tokenizer.model', 'tensorboard', 'init_from.json'}
RUN |= {'checkpoints', 'checkpoints-damaged', 'tokenizer.json', 'tokenizer_config.json'}
SWEEP = {'results.jsonl', 'windows.npz', 'frontier.json', 'frontier.png', 'report.md', '.lock'}
SWEEP |= {'report.html', 'looks.json', 'trials', 'logs', 'costs', 'ray', 'starts'}
PICTURES = {'.png': (b'\x89PNG',), '.pdf': (b'%PDF',), '.svg': (b'<?xml', b'<svg')}


def folder(flag: str, given: str) -> Path:
  """The folder that --flag names, or will name once it is made."""
  path = _readable_name(flag, given)
  if path.is_symlink() and not path.exists():
    raise UserError(f'--{flag}={given}: is a link to what is not there; mend it or choose another')
  if path.exists() and not path.is_dir():
    raise UserError(f'--{flag}={given}: is not a folder; choose another')
  return path


def check_workdir(path: Path) -> None:
  """Raises UserError unless checkpoints that are written below `path` can be read again.

  etils, through which Orbax lists its files, takes the folder's own name for a part of the pattern.
  """
  whole = str(path.absolute())
  special = re.search(r'[][*?]', whole)
  if special:
    raise UserError(
      f'--workdir={path}: Orbax takes {special[0]} in {whole} for a pattern and loses its '
      'checkpoints there; choose a path without, or give a link to it that has none'
    )
  if len(os.fsencode(whole)) + BELOW > LONGEST_PATH:
    raise UserError(f'--workdir={path}: is too long for the paths below it; choose a shorter one')


def source(flag: str, given: str, example: str) -> Path:
  """The regular file that --flag names, to be read."""
  path = _readable_name(flag, given)
  if not path.exists():
    raise UserError(f'--{flag}={given}: no such file; give one such as {example}')
  if not path.is_file():
    raise UserError(f'--{flag}={given}: is not a regular file; give one such as {example}')
  return path


def output(flag: str, given: str | None, key: str) -> Path | None:
  """The JSON file that --flag names, to be written; None if the flag was not given.

  What is there may only be an earlier output, a JSON object that has `key`, or empty. Raises
  UserError also for a link, a pipe or a device.
  """
  if given is None:
    return None
  path = _writable(flag, given)
  if path.exists():
    content = files.read_bytes(path, 'choose another')
    try:
      ours = not content or key in json.loads(content)
    except (ValueError, TypeError, RecursionError):
      ours = False
    if not ours:
      raise UserError(
        f'--{flag}={given}: a file is there that is no earlier result of this command; choose '
        'another name, or remove it'
      )
  return path


def picture(flag: str, given: str | None) -> Path | None:
  """The picture that --flag names, as output; the name's ending says the format."""
  if given is None:
    return None
  path = _writable(flag, given)
  starts = PICTURES.get(path.suffix.lower())
  if starts is None:
    raise UserError(f'--{flag}={given}: the name must end in {", ".join(PICTURES)}')
  if path.exists():
    content = files.read_bytes(path, 'choose another')
    if content and not content.startswith(starts):
      raise UserError(
        f'--{flag}={given}: a file is there that is no {path.suffix} picture; choose another name, '
        'or remove it'
      )
  return path


def distinct(**outputs: Path | None) -> None:
  """Raises UserError if two flags name the same file."""
  flags: dict[Path, str] = {}
  for flag, path in outputs.items():
    if path is not None and flags.setdefault(path.resolve(), flag) != flag:
      raise UserError(
        f'--{flag}={path}: is what --{flags[path.resolve()]} names; choose another for one of them'
      )


def _readable_name(flag: str, given: str) -> Path:
  """The path with ~ replaced; UserError if there is no such path on any disk of ours."""
  if not given:
    raise UserError(f'--{flag}: is empty; name one, or leave the flag out')
  if any(unicodedata.category(letter) == 'Cc' for letter in given):
    raise UserError(f'--{flag}={given!r}: has a control character in its name; choose another')
  try:
    same = os.fsencode(given) == given.encode()
  except UnicodeEncodeError:
    same = False
  if not same:
    raise UserError(f'--{flag}={given!r}: is not UTF-8, as Orbax needs it; choose another name')
  path = files.local_path(f'--{flag}', given)
  for name in path.parts:
    if len(name.encode()) > LONGEST_NAME:
      raise UserError(
        f'--{flag}={given}: a name of {len(name.encode())} bytes, and {LONGEST_NAME} is the most; '
        'choose a shorter one'
      )
  try:
    path.stat()
  except FileNotFoundError:
    pass
  except OSError as error:
    raise files.cannot(f'--{flag}={given}: cannot be used', error, 'choose another') from error
  return path


def _writable(flag: str, given: str) -> Path:
  path = _readable_name(flag, given)
  if path.is_symlink():
    raise UserError(f'--{flag}={given}: is a link; name the file itself')
  if path.is_dir() or not path.parent.is_dir():
    raise UserError(f'--{flag}={given}: not a file in a folder that exists; choose another')
  if path.exists() and not stat.S_ISREG(path.stat().st_mode):
    raise UserError(f'--{flag}={given}: is not a regular file; choose another')
  owner = _owner(path.parent.resolve() / path.name)
  if owner is not None:
    raise UserError(
      f'--{flag}={given}: is a name of the run or sweep in {owner}; choose another path'
    )
  if not all(os.access(p, os.W_OK) for p in (path.parent, path) if p.exists()):
    raise UserError(f'--{flag}={given}: no right to write there; choose another')
  return path


def _owner(path: Path) -> Path | None:
  """The run or the sweep to which a file of this path belongs."""
  for above in path.parents:
    first = path.relative_to(above).parts[0]
    run = first in RUN and (above / 'config.json').is_file()
    sweep = first in SWEEP and any((above / name).exists() for name in ('results.jsonl', 'trials'))
    if run or sweep:
      return above
  return None
