"""Checkpoints: the whole training state and the data position, through Orbax, asynchronously.

checkpoints/STEP/ holds `params` and `training` (optimiser, step, random key) as flat dicts of
arrays, `data` (Grain's position, one file a process) and `run` (what identifies the run, as JSON).
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mla import files
from mla.config import ADDED_SINCE
from mla.errors import UserError, first_line

# May change when a run goes on: where it computes and what it writes, not what it learns.
FREE_FIELDS = (
  'mesh attention_impl remat eval_every checkpoint_every checkpoints_kept log_every data.data_dir '
  'data.eval_tokens'
).split()


class Checkpoints:
  """A run's checkpoints; `kept` of them, the oldest go first."""

  def __init__(self, workdir: Path, kept: int = 1):
    self._path = (workdir / 'checkpoints').absolute()
    self._kept = kept
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=self._kept, create=True)
    return ocp.CheckpointManager(self._path, options=options)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, params, training, batches: grain.DatasetIterator, run: dict) -> None:
    """Starts writing; returns once the arrays are copied and may be donated."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(flatten(params)),
        training=ocp.args.StandardSave(flatten(training)),
        data=grain.checkpoint.CheckpointSave(batches),
        run=ocp.args.JsonSave(run),
      ),
    )

  def restore(
    self, params, training, batches: grain.DatasetIterator, data: str
  ) -> tuple[int, Any, Any] | None:
    """The newest whole checkpoint as (step, params, training), placed as the abstract trees say.

    Also sets the position of `batches`. A damaged checkpoint is moved aside with a warning, and the
    one before is taken; None if there has never been any. Raises UserError if all are damaged, or
    if the run's text is not the one whose digest is `data`.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        self.check_data(step, data)
        found = self._manager.restore(
          step,
          args=ocp.args.Composite(
            params=ocp.args.StandardRestore(flatten(params)),
            training=ocp.args.StandardRestore(flatten(training)),
            data=grain.checkpoint.CheckpointRestore(batches),
          ),
        )
        return step, unflatten(params, found['params']), unflatten(training, found['training'])
      except UserError:
        raise
      except Exception as error:  # whatever a broken file makes the libraries raise
        logging.warning('checkpoint %d is damaged (%s)', step, first_line(error))
        self._set_aside(step)
    if steps:
      raise UserError(
        f'{self._path}: every checkpoint is damaged; they lie in {self._path}-damaged. Start again '
        'with a new --workdir'
      )
    return None

  def restore_params(self, step: int, params):
    """Only the parameters of one checkpoint."""
    restored = self._manager.restore(
      step, args=ocp.args.Composite(params=ocp.args.StandardRestore(flatten(params)))
    )
    return unflatten(params, restored['params'])

  def check_data(self, step: int, data: str) -> None:
    """Raises UserError unless a checkpoint's run was trained on the text of this digest."""
    found = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
    if found['run']['data'] != data:
      raise UserError(
        f'data: {self._path.parent} was trained on another text or tokenizer than data.* gives '
        'now; restore what its config.json names there, or use another --workdir'
      )

  def _set_aside(self, step: int) -> None:
    aside = self._path.with_name('checkpoints-damaged') / str(step)
    aside.parent.mkdir(exist_ok=True)
    if aside.exists():
      shutil.rmtree(aside)
    self._manager.close()
    os.replace(self._path / str(step), aside)
    self._manager = self._open()

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def flatten(tree) -> dict[str, Any]:
  """A tree as {path: array}, so that files depend on names and not on container classes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def unflatten(like, flat: dict[str, Any]):
  """The inverse of flatten, in the structure of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in flatten(like)])


def identity(config: ConfigDict) -> dict[str, Any]:
  """The fields, by dotted name, that must stay the same for a run to go on exactly."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      flat.update({f'{name}.{key}': item for key, item in value.items()})
    else:
      flat[name] = value
  return {
    name: value
    for name, value in flat.items()
    if name not in FREE_FIELDS and name.split('.')[0] not in FREE_FIELDS
  }


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
  """Makes the folder this run's own: writes config.json, or checks that the one there fits.

  Raises UserError if the folder holds something else, or a run that differs in a field that counts.
  """
  path = workdir / 'config.json'
  if path.exists():
    there, here = identity(read_config(workdir)), identity(config)
    for name in sorted({*there, *here}):
      if there.get(name) != here.get(name):
        raise UserError(
          f'{name}={here.get(name)}: {workdir} holds a run with {name}={there.get(name)}; use that '
          'value to go on, or another --workdir'
        )
    return
  if workdir.exists() and (not workdir.is_dir() or not all(map(files.is_draft, workdir.iterdir()))):
    raise UserError(
      f'--workdir={workdir}: is not empty and holds no config.json of a run; choose another folder'
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(config.to_dict(), indent=2) + '\n')
  except OSError as error:
    raise files.cannot(
      f'--workdir={workdir}: cannot be written', error, 'choose another'
    ) from error


def read_config(workdir: Path) -> ConfigDict:
  """The config of the run in workdir; UserError if there is none or it cannot be read."""
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'--workdir={workdir}: no run there (config.json is missing); train one first')
  cure = 'restore it or train again elsewhere'
  found = files.read_json(path, cure)
  if not isinstance(found, dict):
    raise UserError(f'{path}: cannot be read as a config, for it is no JSON object; {cure}')
  return ConfigDict({**ADDED_SINCE, **found})
