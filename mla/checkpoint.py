"""Checkpoints: the whole training state and the data position, through Orbax, asynchronously.

checkpoints/STEP/ holds `params` and `training` (optimiser, step, random key) as flat dicts of
arrays, `run` (what identifies the run, and how many batches it has taken, as JSON), and SHA256SUMS,
the checksums of all their files, which is there before the folder gets its name. Checkpoints of
earlier versions have no checksums and keep `data`, Grain's position, which always was the step.

Only what is proved to be damaged is set aside: a file that differs from its checksum or is missing,
or without checksums content that the system gives but no library can read. All else is an error
that moves nothing: rights, memory, another version or number of processes, a config that differs.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mla import checksums, files, hosts, metrics
from mla import config as config_lib
from mla.errors import MachineError, UserError, causes, first_line
from mla.workdir import difference, read_config

IMPORTED = 'imported'  # what stands for the text of a run whose weights came from elsewhere
SAVED = '.saved'  # a file that says that the run once had a checkpoint
AT_A_TIME = 2**25  # bytes of arrays that are under way, or one larger array
PIECE = 2**22  # bytes of an array that are compressed at once, where it is cut into pieces
UNFINISHED = '.orbax-checkpoint-tmp'
TIMEOUT = 600  # seconds that processes wait for each other's part of a checkpoint


class Damaged(Exception):
  """A checkpoint's content is proved not to be what was written."""


class Restored(NamedTuple):
  step: int
  batches: int  # taken so far by the whole run; the next one is this one's
  params: Any
  training: Any


class Checkpoints:
  """A run's checkpoints; `kept` of them stay, the oldest go first. Touches nothing until open()."""

  def __init__(self, workdir: Path, kept: int = 1):
    self._workdir = workdir.absolute()
    self._path = self._workdir / 'checkpoints'
    self._aside = self._workdir / 'checkpoints-damaged'
    self._kept = kept
    self._opened: tuple[int, int] | None = None  # which folder, as the system knows it
    self._writer: ocp.AsyncCheckpointer | None = None
    self._writing: int | None = None

  def steps(self) -> list[int]:
    """The whole checkpoints, oldest first."""
    try:
      return sorted(
        int(path.name) for path in self._path.iterdir() if _is_step(path.name) and path.is_dir()
      )
    except FileNotFoundError:
      return []
    except OSError as error:
      raise files.cannot(f'{self._path}: cannot be read', error, 'permit that') from error

  # Writing.

  def open(self) -> None:
    """Makes the folder and clears away what a kill left unfinished; for the one who writes."""
    hosts.first_decides(self._prepare)
    folder = self._path.stat()
    self._opened = folder.st_dev, folder.st_ino

  def _prepare(self) -> None:
    try:
      if self._path.is_symlink():
        raise UserError(f'{self._path}: is a link; move its folder here, or link the whole workdir')
      self._path.mkdir(exist_ok=True)
      self._clear_unfinished()
      if self.steps():
        self._note_saved()
    except OSError as error:
      raise files.cannot(f'{self._path}: cannot be written', error, 'permit that') from error

  def save(self, step: int, params, training, run: dict) -> None:
    """Starts writing; returns once the arrays are copied and may be donated.

    training is None of weights that came from elsewhere: such a run can be read, not gone on with.

    Waits for the checkpoint before, and raises MachineError or UserError if it or the start of this
    one could not be written; no whole checkpoint is touched by that.
    """
    with self._told_in_one_line():
      self._finish()
      if self._writer is None:
        options = ocp.AsyncOptions(
          timeout_secs=TIMEOUT,
          post_finalization_callback=self._add_checksums,
          # Waiting for a folder that could not be made would last until the timeout.
          create_directories_asynchronously=False,
        )
        # Who writes while nothing else goes on holds the arrays once, and a piece more in passing.
        few = {} if training is not None else {'params': _one_by_one(flatten(params))}
        handler = ocp.CompositeCheckpointHandler(
          *(name for name in ('params', 'training', 'run') if name not in few),
          composite_options=ocp.CompositeOptions(async_options=options),
          **few,
        )
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
      self._writing = step
      pieces = None if training is not None else _in_pieces(flatten(params))
      parts = {
        'params': ocp.args.StandardSave(flatten(params), save_args=pieces),
        'run': ocp.args.JsonSave({**run, 'checksums': checksums.NAME}),
      }
      if training is not None:
        parts['training'] = ocp.args.StandardSave(flatten(training))
      self._writer.save(self._path / str(step), args=ocp.args.Composite(**parts))

  def check(self) -> None:
    """Raises what went wrong with the checkpoint being written, if that is known by now."""
    if self._writer is None:
      return
    with self._told_in_one_line():
      self._check_folder()
      self._writer.check_for_errors()
      if hosts.is_first() and not (self._workdir / SAVED).exists() and self.steps():
        self._note_saved()

  def close(self) -> None:
    """Waits for what is being written; raises as save()."""
    if self._writer is None:
      return
    with self._told_in_one_line():
      self._finish()
      self._writer.close()
      self._writer = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, trace) -> None:
    # An error on its way out is the one to tell.
    with contextlib.suppress(Exception) if error else contextlib.nullcontext():
      self.close()

  def _finish(self) -> None:
    """Waits for the checkpoint being written; then those beyond `kept` go."""
    if self._opened is None:
      self.open()
    self._check_folder()
    if self._writer is None:
      return
    self._writer.wait_until_finished()
    self._check_folder()
    if hosts.is_first():
      self._note_saved()
      for step in self.steps()[: -self._kept]:
        if (self._path / str(step)).is_symlink():
          continue  # it lies in a place that is not the run's
        # Under a name of its own first: what a kill leaves of it is no checkpoint.
        going = self._path / f'{step}{UNFINISHED}'
        os.rename(self._path / str(step), going)
        shutil.rmtree(going, ignore_errors=True)  # the next start clears what is left

  def _check_folder(self) -> None:
    """Raises MachineError if the folder is not the one opened; Orbax would make it anew."""
    try:
      folder = self._path.stat()
    except (FileNotFoundError, NotADirectoryError):
      folder = None
    except OSError as error:
      raise files.cannot(f'{self._path}: cannot be read', error, 'permit that') from error
    if folder is None or (folder.st_dev, folder.st_ino) != self._opened:
      raise MachineError(
        f'{self._path}: the folder has gone while the run was at work; put it back, then run the '
        'same again'
      )

  def _add_checksums(self) -> None:
    """Called in the first process when all files are written, before the folder gets its name."""
    checksums.write(self._path / f'{self._writing}{UNFINISHED}', ('params', 'training', 'run'))

  def _note_saved(self) -> None:
    path = self._workdir / SAVED
    if not path.exists():
      files.write_whole(path, 'this run has had a checkpoint; without one it does not start anew\n')

  def _clear_unfinished(self) -> None:
    for path in self._path.iterdir():
      if re.fullmatch(rf'\d+{re.escape(UNFINISHED)}.*', path.name) and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)

  @contextlib.contextmanager
  def _told_in_one_line(self) -> Iterator[None]:
    """Whatever keeps a checkpoint from being written, as an error for the user."""
    try:
      yield
    except Exception as error:
      self._writer = None  # its thread has ended, and what it knows is told here
      if isinstance(error, (UserError, MachineError)):
        raise
      self._check_folder()
      if hosts.is_first():
        with contextlib.suppress(OSError):
          self._clear_unfinished()  # it takes space that is needed
      doing = f'{self._path}: checkpoint {self._writing} cannot be written'
      refused = files.refusal(error)
      if refused is not None:
        raise files.cannot(doing, refused, 'permit that') from error
      reason = f'{type(error).__name__}: {first_line(error)}'
      raise MachineError(f'{doing} ({reason}); those before it are whole') from error

  # Reading.

  def restore(self, params, training, run: dict) -> Restored | None:
    """The newest checkpoint that is whole, its arrays placed as the abstract trees say.

    A damaged one is moved to checkpoints-damaged with a warning, and the one before is taken. None
    if there has never been any. Raises UserError if all are damaged or gone, if the run's text or
    config is not that of `run`, or if a whole one does not fit; MachineError where memory or
    handles lack. Over several processes the first decides what is damaged.
    """
    while True:
      found = hosts.first_decides(functools.partial(self._newest_whole, run))
      if found is None:
        return None
      step, batches = found
      failure: Exception | None = None
      try:
        parts = (self._read(step, 'params', params), self._read(step, 'training', training))
      except (Damaged, UserError, MachineError) as error:
        failure = error
      verdict = hosts.largest(0 if failure is None else 1 if isinstance(failure, Damaged) else 2)
      if verdict == 0:
        return Restored(step, batches, *parts)
      if verdict == 2:
        if failure is not None and not isinstance(failure, Damaged):
          raise failure
        raise MachineError(f'{self._path}: another process of the run cannot read it, as it says')
      hosts.first_decides(functools.partial(self._set_aside, step, str(failure or 'unreadable')))

  def read_params(self, params, run: dict) -> tuple[int, Any]:
    """The newest checkpoint's step and parameters. Writes nothing, so the folder needs no rights.

    Raises UserError if there is none, if it is damaged, or as restore(). Over several processes the
    first says which is the newest.
    """
    while True:
      step = hosts.first_decides(self._newest)
      failure: Exception | None = None
      try:
        found = self._read_params(step, params, run)
      except (UserError, MachineError) as error:
        failure = error
      if not hosts.largest(failure is not None):
        return step, found
      if hosts.first_decides(self._newest) == step:
        raise failure or MachineError(
          f'{self._path}: another process of the run cannot read it, as it says'
        )
      # A run at work has put a newer one in its place.

  def newest(self) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """What the newest checkpoint says of its run, and its parameters' shapes by path."""
    step = self._newest()
    folder = self._path / str(step)
    try:
      found = ocp.StandardCheckpointHandler().metadata(folder / 'params')
      shapes = {name: tuple(leaf.shape) for name, leaf in found.tree.items()}
      return self._run(step), shapes
    except Exception as error:  # whatever damage makes Orbax raise
      raise UserError(f'{folder}: cannot be read ({first_line(error)}); restore it') from error

  def _newest(self) -> int:
    steps = self.steps()
    if not steps:
      raise UserError(f'--workdir={self._workdir}: the run has no checkpoint yet; train it first')
    return steps[-1]

  def _read_params(self, step: int, params, run: dict):
    try:
      self._check_whole(step, ('params', 'run'))
      self._check_run(step, run)
      return self._read(step, 'params', params)
    except Damaged as damaged:
      raise UserError(
        f'{self._path}/{step}: cannot be read ({damaged}); run train.py on the same workdir '
        'to go on from the one before'
      ) from damaged

  def _newest_whole(self, run: dict) -> tuple[int, int] | None:
    """(step, batches taken) of the newest checkpoint that is not damaged; those that are go."""
    for step in reversed(self.steps()):
      try:
        if 'origin' in self._run(step):
          raise UserError(
            f'--workdir={self._workdir}: holds weights that were converted, without what training '
            f'them needs to go on; give another --workdir and --init_from={self._workdir}'
          )
        self._check_whole(step, ('params', 'training', 'run'))
        saved = self._check_run(step, run)
        return step, int(saved.get('batches', step))
      except Damaged as damaged:
        self._set_aside(step, str(damaged))
    self._check_never_saved()
    return None

  def _check_whole(self, step: int, parts: tuple[str, ...]) -> None:
    folder = self._path / str(step)
    try:
      damage = checksums.difference(folder, parts)
      has_checksums = (folder / checksums.NAME).exists()
    except OSError as error:
      raise files.cannot(f'{folder}: cannot be read', error, 'permit that') from error
    if damage is not None:
      raise Damaged(damage)
    if not has_checksums and 'checksums' in self._run(step):
      raise Damaged(f'{checksums.NAME} is missing')

  def _run(self, step: int) -> dict:
    path = self._path / str(step) / 'run' / 'metadata'
    try:
      if not path.is_file():
        raise Damaged('run/metadata is missing')
      run = json.loads(path.read_bytes().decode())
    except OSError as error:
      raise files.cannot(f'{path}: cannot be read', error, 'permit that') from error
    except (ValueError, RecursionError) as error:
      raise Damaged('run/metadata is no JSON') from error
    if not isinstance(run, dict) or not isinstance(run.get('data'), str):
      raise Damaged('run/metadata says nothing of the data')
    return run

  def _check_run(self, step: int, run: dict) -> dict:
    """What the checkpoint says of its run; UserError unless that is the run asked for."""
    saved = self._run(step)
    tokenizer = run.get('tokenizer')
    if tokenizer is not None and saved.get('tokenizer', tokenizer) != tokenizer:
      raise UserError(
        f'{self._workdir}: its tokenizer is not the one it was trained with; restore that'
      )
    if run.get('data') is not None and saved['data'] not in (run['data'], IMPORTED):
      raise UserError(
        f'data: {self._workdir} was trained on another text or tokenizer than data.* gives '
        'now; restore what its config.json names there, or use another --workdir'
      )
    if isinstance(saved.get('config'), dict):
      # A config.json that was changed by hand or damaged would run these weights as another model.
      path = self._path / str(step) / 'run' / 'metadata'
      there, here = (config_lib.from_json(dict(r['config']), path) for r in (saved, run))
      name, there, here = difference(there, here)
      if name:
        raise UserError(
          f'{name}={here}: {self._path}/{step} was trained with {name}={there}; restore '
          'config.json or give that value'
        )
    return saved

  def _read(self, step: int, part: str, abstract):
    """One part's arrays, in the structure and places of the abstract tree."""
    folder = self._path / str(step)
    try:
      # No Checkpointer, in which every process would wait for one that failed.
      args = ocp.args.StandardRestore(flatten(abstract))
      flat = _one_by_one(flatten(abstract)).restore(folder / part, args=args)
    except Exception as error:
      refused = files.refusal(error)
      if refused is not None:
        raise files.cannot(f'{folder}: cannot be read', refused, 'permit that') from error
      unchecked = not (folder / checksums.NAME).exists()
      reason = first_line(list(causes(error))[-1])
      if unchecked and _is_proof(error):
        raise Damaged(f'{part}: {reason}') from error
      whole = 'nothing proves it damaged' if unchecked else 'its files are whole'
      raise UserError(
        f'{folder}/{part}: does not fit this run, though {whole} ({reason}); go on with '
        'the version and the JAX settings that wrote it, or use another --workdir'
      ) from error
    return unflatten(abstract, flat)

  def _set_aside(self, step: int, damage: str) -> None:
    if self._aside.is_symlink():
      raise UserError(
        f'{self._aside}: is a link; remove it, for damaged checkpoints are kept there'
      )
    try:
      self._aside.mkdir(exist_ok=True)
      place = files.unused(self._aside / str(step))
      os.rename(self._path / str(step), place)
    except OSError as error:
      doing = f'{self._path}/{step}: is damaged ({damage}) and cannot be set aside'
      raise files.cannot(doing, error, f'move it away, and mend {self._aside}') from error
    logging.warning('checkpoint %d is damaged (%s); it lies in %s now', step, damage, place)

  def _check_never_saved(self) -> None:
    """Raises UserError if there were checkpoints once: a run must not start over by itself."""
    try:
      damaged = self._aside.is_dir() and any(self._aside.iterdir())
    except OSError as error:
      raise files.cannot(f'{self._aside}: cannot be read', error, 'permit that') from error
    if damaged:
      raise UserError(
        f'{self._path}: every checkpoint is damaged; they lie in {self._aside}. Put back one you '
        'trust, or start again with a new --workdir'
      )
    if (self._workdir / SAVED).exists() or self._metrics_tell_of_one():
      raise UserError(
        f'{self._path}: holds no checkpoint, but the run has had some; put them back, or start '
        'again with a new --workdir'
      )

  def _metrics_tell_of_one(self) -> bool:
    """Whether more steps are told than a run may have taken before its first whole checkpoint.

    For runs of earlier versions. The second save waits for the first.
    """
    path = self._workdir / 'metrics.jsonl'
    if not path.exists():
      return False
    every = read_config(self._workdir).get('checkpoint_every')
    steps = [line['step'] for line in metrics.read(path)]
    return isinstance(every, int) and max(steps, default=0) > 2 * every


def _one_by_one(arrays: Mapping[str, Any]) -> ocp.StandardCheckpointHandler:
  """Writes or reads no more at a time than the largest array, or many that are small: without a
  bound, as much again as the arrays take is held while they are under way.

  Each piece of an array goes to a file of its own: in a database of all arrays, OCDBT, pieces took
  two to three times as much memory (docs/log.md). Reads either.
  """
  sizes = (math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
  bound = (max(*sizes, AT_A_TIME) + 2**20) / 10**9  # what is asked for has to be less
  return ocp.StandardCheckpointHandler(
    save_concurrent_gb=bound, restore_concurrent_gb=bound, use_ocdbt=False
  )


def _in_pieces(arrays: Mapping[str, Any]) -> dict[str, ocp.SaveArgs]:
  """Arrays cut into pieces, of which each thread compresses one at a time."""
  return dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=PIECE))


def _is_step(name: str) -> bool:
  return re.fullmatch(r'0|[1-9][0-9]{0,17}', name) is not None


def _is_proof(error: Exception) -> bool:
  """Whether a library's error, on files the system gives, can only come from their content."""
  kinds = (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
  # TensorStore's, in the middle of a file; on a whole one that lacks a name it is `Metadata at`.
  text = (
    r'DATA_LOSS|Data corruption|(OUT_OF_RANGE|FAILED_PRECONDITION|NOT_FOUND): .*Error reading "'
  )
  return any(isinstance(cause, kinds) or re.search(text, str(cause)) for cause in causes(error))


def flatten(tree) -> dict[str, Any]:
  """A tree as {path: array}, so that files depend on names and not on container classes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def unflatten(like, flat: dict[str, Any]):
  """The inverse of flatten, in the structure of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in flatten(like)])
