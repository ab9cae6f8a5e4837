"""What a sweep keeps of its trials. A result is found by its config, whatever its trial is called.

DIR/results.jsonl   a line a trial
DIR/windows.npz     each trial's loss on every evaluation window
DIR/costs/          an arm's FLOPs and training memory; a cache, made again where it is damaged

The first two can't be made again without training, so what is wrong with them is refused, by name
and with the cure, before anything is written. Lines and costs carry a checksum: in a number one
bit that flipped makes another number, and no other sign of it.
"""

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla import config as config_lib
from mla import files
from mla.errors import UserError, first_line
from mla.sweep import widths
from mla.sweep.trials import REPEATED, Trial, find_workdirs

NUMBER = (int, float)
# What every line says, and what those of finished trials do; more may stand there.
COMMON: dict[str, type | tuple[type, ...]] = {
  'trial': str,
  'arm': str,
  'seed': int,
  'learning_rate': NUMBER,
  'fields': dict,
  'digest': str,
  'arm_digest': str,
}
DONE = COMMON | {
  'loss': NUMBER,
  'attention': str,
  'latent_dim': (int, type(None)),
  'params_total': int,
  'params_non_embedding': int,
  'cache_dtype': str,
  'kv_cache_bytes_per_token': NUMBER,
  'bits_per_byte': (*NUMBER, type(None)),  # None of a probe
  'tokens_evaluated': int,
  'tokens_per_second': (*NUMBER, type(None)),
}
FAILED = COMMON | {'error': str}

JOINED = 'joined'  # where a run stands that the sweep did not train: a hash of its config

# Of data.*, what changes no text and no token.
WHICH_PART = {'data.eval_tokens', 'data.packing', 'data.data_dir'}

RESTORE = (
  'restore the file, or take that line out: its trial is then scored again from its workdir, or '
  'trained if that has gone'
)
WITHOUT = 'restore the file, or remove it: only the report\'s column "text" then lacks what it held'


class Results:
  """results.jsonl and windows.npz; written anew, whole, after every trial.

  Raises UserError if one of them is damaged or no sweep's; OSErrors on writing become one line too.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._path, self._windows_path = folder / 'results.jsonl', folder / 'windows.npz'
    self._lines = {line['trial']: line for line in read_lines(self._path)}
    self._windows = read_windows(self._windows_path)
    self._found = {_key(line): line for line in unlike(self._lines.values())}

  def find(self, trial: Trial) -> dict[str, Any] | None:
    """The line of the trial's config, under whatever name."""
    return self._found.get((trial.digest, trial.arm_digest))

  def has(self, trial: Trial) -> bool:
    """Whether there is nothing left to do: it is done, or it diverged, as it would again."""
    line = self.find(trial)
    return line is not None and (line['status'] == 'done' or has_diverged(line))

  def of(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    found = [self.find(trial) for trial in trials]
    return [line for line in found if line is not None]

  def other_text(self, line: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The line of a trial that was read on another text or tokenizer than this one, or None."""
    return other_text(line, self._lines.values())

  def settle(self, trials: Sequence[Trial]) -> list[Trial]:
    """The trials by the names that their folders have here: an older order of fields made others.

    Raises UserError if what is here under a trial's name, or its arm's, has other settings.
    """
    arms = {line['arm']: line for line in self._lines.values()}
    digests = {line['digest'] for line in self._lines.values()}
    there: dict[str, str] | None = None  # looked at only when needed
    settled = []
    for trial in trials:
      line, name = self.find(trial), trial.name
      if line is not None:
        name = line['trial']
      elif trial.digest in digests:
        raise UserError(
          f'data.eval_tokens={trial.config.data.eval_tokens}: {self._path} holds the result of '
          f'trial {name} over another number; set that one, or use another --workdir'
        )
      elif not os.path.exists(self._folder / 'trials' / name / 'config.json'):
        there = find_workdirs(self._folder) if there is None else there
        name = there.get(trial.digest, name)
      of_arm, same_name = arms.get(trial.arm, trial.line), self._lines.get(name, trial.line)
      if of_arm.get(JOINED):
        raise UserError(
          f'trial {name}: {self._path} holds a run of that name that the sweep did not train '
          '(report.py --run); give the arm another name, or take that line out'
        )
      if of_arm['arm_digest'] != trial.arm_digest:
        raise UserError(
          f'trial {name}: {self._path} holds trials of {trial.arm} with '
          f'{_other_settings(of_arm, trial)}; use another --workdir'
        )
      if same_name['digest'] != trial.digest:
        raise UserError(
          f'trial {name}: {self._path} holds its result with '
          f'{_other_settings(same_name, trial)}; use another --workdir'
        )
      settled.append(dataclasses.replace(trial, name=name))
    return settled

  def rename_arms(self, trials: Sequence[Trial]) -> None:
    """Gives results the trials' names of their arms, so that no arm is told as two."""
    ours = {(_words(trial.arm), trial.arm_digest): trial.arm for trial in trials}
    for trial in trials:
      line = self.find(trial)
      if line is not None:
        ours[_words(line['arm']), line['arm_digest']] = trial.arm
    changed = False
    for line in self._lines.values():
      name = ours.get((_words(line['arm']), line['arm_digest']), line['arm'])
      changed |= name != line['arm']
      line['arm'] = name
    if changed:
      self._write()

  def add(self, line: dict[str, Any]) -> None:
    windows = {line['trial']: line.pop('window_nll', None)}
    for prefix in line.get('prefixes', []):
      name = widths.name(line['trial'], prefix['latent_dim'])
      windows[name] = prefix.pop('window_nll', None)
    told = {name: np.asarray(nll, np.float32) for name, nll in windows.items() if nll is not None}
    if told:
      self._windows |= told
      self._replace(self._windows_path, _packed(self._windows))
    self._lines[line['trial']] = self._found[_key(line)] = line
    self._write()

  def _write(self) -> None:
    text = ''.join(json.dumps(_sealed(line)) + '\n' for line in self._lines.values())
    self._replace(self._path, text)

  def _replace(self, path: Path, content: bytes | str) -> None:
    try:
      files.write_whole(path, content)
    except OSError as error:
      raise files.cannot(f'{path}: cannot be written', error, 'permit it') from error


def has_diverged(line: Mapping[str, Any]) -> bool:
  return bool(line.get('diverged'))


def unlike(lines: Sequence[dict[str, Any]] | Any) -> list[dict[str, Any]]:
  """The lines without those of a config that another one is of; one that is done goes first.

  Older versions did a config again when its flags came in another order.
  """
  found: dict[tuple[str, str], dict[str, Any]] = {}
  for line in lines:
    other = found.get(_key(line))
    if other is None or (other['status'] != 'done' and line['status'] == 'done'):
      found[_key(line)] = line
  return list(found.values())


def other_text(
  line: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
  """The first of the lines that is of another text or tokenizer than this one, or None.

  Nats a token of the two can't be compared. Older lines don't tell.
  """
  ours = line.get('data_digest')
  unlike = (other for other in lines if ours and other.get('data_digest', ours) != ours)
  return next(unlike, None)


def told_apart(line: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """By which fields two lines read unlike texts or tokens; '' where it is the files that differ."""
  here, there = ({**of.get('settings', {}), **of['fields']} for of in (line, other))
  names = {name for name in here.keys() | there.keys() if name.startswith('data.')} - WHICH_PART
  names |= {'seq_len'} if 'probe' in here.get('data.dataset', '') else set()

  def values(name: str) -> list[Any]:
    return [of.get(name, config_lib.ADDED.get(name)) for of in (here, there)]

  found = {name: values(name) for name in sorted(names)}
  return '; '.join(f'{name}={a} or {b}' for name, (a, b) in found.items() if a != b)


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
  """What is trained, and what it is scored on: the arm's digest counts data.eval_tokens."""
  return line['digest'], line['arm_digest']


def _other_settings(line: Mapping[str, Any], trial: Trial) -> str:
  """The fields whose values a line tells other than the trial has them."""
  there = {**line.get('settings', {}), **line['fields']}
  here = {**trial.settings, **trial.fields}
  unlike = [
    f'{name}={value}'
    for name, value in sorted(there.items())
    if name not in REPEATED and value != here.get(name)
  ]
  return ', '.join(unlike) or 'other settings'


def _words(arm: str) -> tuple[str, ...]:
  """An arm's name whatever the order of the fields in it."""
  return tuple(sorted(arm.split(',')))


def read_lines(path: Path) -> list[dict[str, Any]]:
  """The lines of a results.jsonl, [] if there is none; UserError that names a line that is none."""
  if not os.path.lexists(path):
    return []
  lines: list[dict[str, Any]] = []
  numbers: dict[str, int] = {}
  for number, raw in enumerate(files.read_bytes(path, 'restore it').split(b'\n'), 1):
    if not raw.strip():
      continue
    line = _parse(raw)
    fault = line if isinstance(line, str) else _fault(line)
    if isinstance(line, dict) and not fault:
      same = numbers.get(line['trial'])
      if same is None:
        numbers[line['trial']] = number
        lines.append(line)
      elif line not in lines:
        fault = f'is of the same trial as line {same}'
    if fault:
      raise UserError(f'{path}: line {number} {fault}; {RESTORE}')
  return lines


def _parse(raw: bytes) -> dict[str, Any] | str:
  """A line's object, or what it is instead."""
  try:
    line = json.loads(raw)
  except (ValueError, RecursionError):
    return 'is no whole JSON'
  if not isinstance(line, dict):
    return 'is no JSON object'
  if 'checksum' in line and line.pop('checksum') != _checksum(line):  # older lines have none
    return 'is not as it was written'
  return line


def _sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {**fields, 'checksum': _checksum(fields)}


def _checksum(fields: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _fault(line: Mapping[str, Any]) -> str:
  """What makes a line no trial's; '' if nothing does."""
  status = line.get('status')
  if status not in ('done', 'failed'):
    return 'has no status, done or failed'
  for name, kind in (DONE if status == 'done' else FAILED).items():
    if name not in line or not isinstance(line[name], kind):
      return f'lacks {name}, or has it in another type'
    if isinstance(line[name], float) and not math.isfinite(line[name]):
      return f'has {name}={line[name]}'
  for prefix in line.get('prefixes', []) if isinstance(line.get('prefixes', []), list) else ['']:
    if not isinstance(prefix, dict) or not all(_is_number(prefix.get(n)) for n in widths.FIGURES):
      return 'has prefixes that lack a number'
  if not isinstance(line.get('settings', {}), dict):  # which older lines lack
    return 'has settings of another type'
  for name in ('trial', 'arm_digest'):  # which become names of files
    if not re.fullmatch(r'[\w=,+-][\w.=,+-]*', line[name]):
      return f'has another {name} than a sweep gives'
  return ''


def _is_number(value: Any) -> bool:
  return isinstance(value, NUMBER) and math.isfinite(value)


def read_windows(path: Path) -> dict[str, np.ndarray]:
  """{trial: loss of each window [W]} of a windows.npz, {} if there is none.

  UserError if it is damaged or something else; nothing is unpickled.
  """
  if not os.path.lexists(path):
    return {}
  raw = files.read_bytes(path, WITHOUT)
  try:
    with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
      windows = dict(stored)
  # Whatever a broken archive makes zipfile, zlib and numpy raise; TypeError: a lone array.
  except Exception as error:
    raise UserError(f'{path}: cannot be read ({first_line(error)}); {WITHOUT}') from error
  for name, nll in windows.items():
    if not _are_losses(nll):
      raise UserError(f'{path}: {name} is not one finite number a window; {WITHOUT}')
  return windows


def _are_losses(nll: Any) -> bool:
  if not isinstance(nll, np.ndarray):  # of a file that holds no array, numpy gives the bytes
    return False
  return nll.ndim == 1 and len(nll) > 0 and nll.dtype.kind == 'f' and bool(np.isfinite(nll).all())


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
  """As np.savez_compressed, which can't take every name: its own arguments are keywords too."""
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as packed:
    for name, array in arrays.items():
      with packed.open(f'{name}.npy', 'w') as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
  return archive.getvalue()


def costs_path(folder: Path, arm_digest: str) -> Path:
  return folder / 'costs' / f'{arm_digest}.json'


def read_costs(folder: Path, arm_digest: str) -> dict[str, Any] | None:
  """What was kept of an arm's costs: cost.training_costs, or {'error': why there are none}.

  None if nothing was, or nothing that can be read.
  """
  try:
    found = files.read_json(costs_path(folder, arm_digest), '')
  except UserError:
    return None
  if not isinstance(found, dict) or found.pop('checksum', '') != _checksum(found):
    return None
  return found if are_costs(found) or isinstance(found.get('error'), str) else None


def write_costs(folder: Path, arm_digest: str, costs: Mapping[str, Any]) -> None:
  """Keeps them; only a warning if that can't be done, for they can be had again."""
  path = costs_path(folder, arm_digest)
  try:
    path.parent.mkdir(exist_ok=True)
    files.write_whole(path, json.dumps(_sealed(costs)) + '\n')
  except OSError as error:
    logging.warning('%s: cannot be written (%s)', path, error.strerror or error)


def costs_of(folder: Path, line: Mapping[str, Any]) -> dict[str, Any]:
  """An arm's flops_per_token and training_memory from one of its lines: None each if unknown.

  Older versions wrote them into the lines. Where they are unknown, 'costs_unknown' says why.
  """
  if are_costs(line):
    return {name: line[name] for name in ('flops_per_token', 'training_memory')}
  found = read_costs(folder, line['arm_digest'])
  if found is not None and 'error' not in found:
    return found
  why = 'run the sweep with this arm again'
  if found is not None:
    path = costs_path(folder, line['arm_digest'])
    why = f'{found["error"]}; remove {path} to have them compiled again'
  return {'flops_per_token': None, 'training_memory': None, 'costs_unknown': why}


def are_costs(found: Any) -> bool:
  try:
    memory = found['training_memory']
    figures = [
      memory[r][b] for r in ('none', 'latents') for b in ('peak_bytes', 'activation_bytes')
    ]
    return all(isinstance(n, NUMBER) and n > 0 for n in [found['flops_per_token'], *figures])
  except (TypeError, KeyError):
    return False
