"""A run's folder: whose it is, what identifies the run in it, and its lease."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mla import config as config_lib
from mla import files, paths
from mla.errors import UserError

# May change when a run goes on: where it computes and what it writes, not what it learns.
FREE_FIELDS = (
  'mesh attention_impl remat eval_every checkpoint_every checkpoints_kept log_every data.data_dir '
  'data.eval_tokens'
).split()

LOCK = '.lock'


def identity(config: ConfigDict) -> dict[str, Any]:
  """The fields, by dotted name, that must stay the same for a run to go on exactly.

  One that was added since counts only where it does not have the value that older runs had. Of a
  tokenizer.json its place does not count: checkpoints name its hash, with that of the text.
  """
  return {
    name: 'hf' if name == 'data.tokenizer' and str(value).startswith('hf:') else value
    for name, value in config_lib.flatten(config).items()
    if name not in FREE_FIELDS
    and name.split('.')[0] not in FREE_FIELDS
    and not (name in config_lib.ADDED and value == config_lib.ADDED[name])
  }


def difference(there: ConfigDict, here: ConfigDict) -> tuple[str, Any, Any]:
  """(name, its value there, here) of a field in which two runs differ; ('', None, None) if none."""
  theirs, ours = identity(there), identity(here)
  for name in sorted({*ours, *theirs}):
    old, new = (side.get(name, config_lib.ADDED.get(name)) for side in (theirs, ours))
    if old != new:
      return name, old, new
  return '', None, None


def check_workdir(config: ConfigDict, workdir: Path) -> None:
  """Raises UserError if the folder holds something else than this run, or nothing. Only looks."""
  paths.check_workdir(workdir)
  try:
    ours = (workdir / 'config.json').exists()
    free = not workdir.exists() or (
      workdir.is_dir()
      and all(path.name == LOCK or files.is_draft(path) for path in workdir.iterdir())
    )
  except OSError as error:
    raise files.cannot(f'--workdir={workdir}: cannot be read', error, 'choose another') from error
  if ours:
    name, there, here = difference(read_config(workdir), config)
    if name:
      raise UserError(_another_run(name, there, here, workdir))
  elif not free:
    raise UserError(
      f'--workdir={workdir}: is not empty and holds no config.json of a run; choose another folder'
    )


def _another_run(name: str, there: Any, here: Any, workdir: Path) -> str:
  """That the folder's run has another value of the field, and what to do."""
  if name == 'num_steps':
    return (
      f'{name}={here}: {workdir} holds a run of {there}, by which its learning rate falls, so a '
      'longer one is another run; train it afresh in another --workdir, or start it from these '
      f'weights with --init_from={workdir} --workdir={workdir}-{here}'
    )
  short = re.sub(r'[^\w.-]', '', str(here))
  key = '' if name == 'attention' else name.split('.')[-1]
  folder = f'{workdir}-{key}{short if len(short) < 12 else ""}'
  value = repr(there) if there == '' else there
  return (
    f'{name}={here}: {workdir} holds a run with {name}={value}; to train this one give it a folder '
    f'of its own, --workdir={folder}; to go on with that one, use its value'
  )


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
  """Makes the folder this run's own: writes config.json, or checks that the one there fits.

  Raises UserError if the folder holds something else, or a run that differs in a field that counts.
  """
  check_workdir(config, workdir)
  path = workdir / 'config.json'
  if path.exists():
    return
  _make(workdir)
  try:
    files.write_whole(path, json.dumps(config_lib.to_json(config), indent=2) + '\n')
  except OSError as error:
    raise files.cannot(
      f'--workdir={workdir}: cannot be written', error, 'choose another'
    ) from error


@contextlib.contextmanager
def lease_workdir(workdir: Path, *, waiting: Callable[[], bool] = lambda: False) -> Iterator[None]:
  """Keeps every other trainer out of the folder, which is made if need be.

  Raises UserError if another process trains there, at once or when waiting() is no longer true.
  """
  _make(workdir)
  busy = f'--workdir={workdir}: another process is training there; wait for it, or choose another'
  with files.lease(workdir / LOCK, busy, waiting=waiting):
    yield


def _make(workdir: Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise files.cannot(
      f'--workdir={workdir}: cannot be written', error, 'choose another'
    ) from error


def read_config(workdir: Path, flag: str = 'workdir') -> ConfigDict:
  """The config of the run in workdir, which --flag named; UserError if there is none, or it breaks
  a rule.

  Fields that came after the run have the value that gives what it did.
  """
  path = workdir / 'config.json'
  cure = 'restore it or train again elsewhere'
  try:
    if not path.exists() and (workdir / 'trials').is_dir():
      raise UserError(f'--{flag}={workdir}: is a sweep; its runs are the folders in its trials/')
    if not path.exists():
      raise UserError(f'--{flag}={workdir}: no run there (config.json is missing); train one first')
  except OSError as error:
    raise files.cannot(f'{path}: cannot be read', error, cure) from error
  return config_lib.from_json(files.read_json(path, cure), path)
