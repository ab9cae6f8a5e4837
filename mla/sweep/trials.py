"""Trials from a config and axes: what a sweep is made of, each checked before any of them trains.

An arm is what a sweep compares; its trials differ in learning rate and seed only.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import runpy
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from mla import backends, files, memory, paths, sharding
from mla import config as config_lib
from mla import model as model_lib
from mla.data import tokenizers
from mla.data.pipeline import Data, eval_windows, load_data, train_batches
from mla.errors import UserError
from mla.workdir import check_workdir, identity, read_config

# What the trials of an arm differ in.
REPEATED = ('learning_rate', 'seed')
# What only the building of the model reads: trials that differ in nothing else, and build the same
# model, are the same.
MODEL_FIELDS = (
  *'attention num_heads head_dim value_head_dim num_layers d_model ffn_dim'.split(),
  *'round_to param_budget'.split(),
  *config_lib.OF_VARIANTS,
)
LONGEST = 150  # bytes of a label in a file's name, which may have 255 with what is added to it


@dataclasses.dataclass(frozen=True)
class Trial:
  name: str  # its folder under trials/
  arm: str
  fields: dict[str, Any]  # what it sets on the sweep's config
  config: ConfigDict

  @property
  def seed(self) -> int:
    return self.config.seed

  @property
  def learning_rate(self) -> float:
    return self.config.learning_rate

  @property
  def digest(self) -> str:
    """What it is, whatever it is called: a hash of every field that counts."""
    return digest(self.config)

  @property
  def arm_digest(self) -> str:
    """The same for all trials of an arm that may be averaged: without what they differ in."""
    fields = learned(self.config) | {'eval_tokens': self.config.data.eval_tokens}
    return hash_of({name: value for name, value in fields.items() if name not in REPEATED})

  @property
  def settings(self) -> dict[str, Any]:
    """What the trial has in common with the sweep's others: the fields that it does not set."""
    fields = learned(self.config) | {'data.eval_tokens': self.config.data.eval_tokens}
    return {name: value for name, value in fields.items() if name not in (*self.fields, *REPEATED)}

  @property
  def line(self) -> dict[str, Any]:
    """What its line in results.jsonl says of the trial itself."""
    return {
      'trial': self.name,
      'arm': self.arm,
      'seed': self.seed,
      'learning_rate': self.learning_rate,
      'fields': self.fields,
      'digest': self.digest,
      'arm_digest': self.arm_digest,
      'settings': self.settings,
    }


def digest(config: ConfigDict, workdir: Path | None = None) -> str:
  return hash_of(learned(config, workdir))


def learned(config: ConfigDict, workdir: Path | None = None) -> dict[str, Any]:
  """The run's identity, in which a tokenizer.json counts by its content, wherever it lies.

  With workdir that of the copy there, if any. UserError if the file cannot be read.
  """
  fields, spec = identity(config), config.data.tokenizer
  if spec.startswith('hf:'):
    kept = workdir / tokenizers.HUGGING_FACE[0] if workdir else None
    path = kept if kept and kept.exists() else Path(spec.removeprefix('hf:'))
    path = path / tokenizers.HUGGING_FACE[0] if path.is_dir() else path
    content = files.read_bytes(path, 'name a tokenizer.json in data.tokenizer=hf:PATH')
    fields['data.tokenizer'] = f'hf:{hashlib.sha256(content).hexdigest()[:16]}'
  return fields


def hash_of(fields: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def parse_axis(text: str) -> list[dict[str, str]]:
  """The points of one --sweep flag, values still as written.

  'latent_dim=16,32' has two points of one field; 'attention,num_kv_heads=gqa:2,mqa:0' two points of
  two fields that move together.
  """
  names, equals, values = text.partition('=')
  fields = [name.strip() for name in names.split(',')]
  zipped = len(fields) > 1  # else a colon belongs to the value, as in bpe:4096
  points = [
    [part.strip() for part in (point.split(':') if zipped else [point])]
    for point in values.split(',')
  ]
  if not equals or not all(fields) or not all(part for point in points for part in point):
    raise UserError(
      f'--sweep={text}: write FIELD=VALUE,VALUE or, for fields that move together, '
      'FIELD,FIELD=VALUE:VALUE,VALUE:VALUE'
    )
  if len(set(fields)) < len(fields):
    raise UserError(f'--sweep={text}: names a field twice')
  for point in points:
    if len(point) != len(fields):
      raise UserError(
        f'--sweep={text}: {":".join(point)} gives {len(point)} values for {len(fields)} fields'
      )
  return [dict(zip(fields, point, strict=True)) for point in points]


def load_arms(path: str) -> dict[str, dict[str, Any]]:
  """{name: fields} from get_arms() of a sweep file such as configs/sweeps/frontier.py."""
  source = paths.source('arms', path, 'configs/sweeps/frontier.py')
  try:
    arms = runpy.run_path(str(source))['get_arms']()
    found = {str(name): dict(fields) for name, fields in arms.items()}
    if len(found) < len(arms):
      raise ValueError('two of its names are the same text')
  except (Exception, SystemExit) as error:  # whatever a file that is no sweep file raises
    reason = f'{type(error).__name__}: {error}'
    raise UserError(f'--arms={path}: no get_arms() can be run there ({reason})') from error
  if not found:
    raise UserError(f'--arms={path}: its get_arms() names no arm; see configs/sweeps/frontier.py')
  return found


def expand(
  config: ConfigDict, arms: Mapping[str, Mapping[str, Any]], axes: Sequence[list[dict[str, str]]]
) -> list[Trial]:
  """Every arm with every combination of the axes' points, the last axis fastest.

  Raises UserError for a field that does not exist, a value of the wrong type, a field set twice, or
  a combination that breaks a rule of config.py, naming the trial.
  """
  trials: list[Trial] = []
  for named, *points in itertools.product(arms.items() or [('', {})], *axes):
    arm, fields = named[0], dict(named[1])
    for point in points:
      twice = fields.keys() & point.keys()
      if twice:
        raise UserError(f'{min(twice)}: set twice for trial {_label(fields | point)}; once will do')
      fields |= point
    trials.append(_make(config, arm, fields, set(arms.get(arm, ()))))
  _refuse_repeated(trials)
  _refuse_ambiguous(trials)
  # Names that some disk would take for one another, by case or the encoding of an accent.
  folded = collections.Counter(_folded(trial.name) for trial in trials)
  return [
    dataclasses.replace(trial, name=f'{trial.name}-{trial.digest[:8]}')
    if folded[_folded(trial.name)] > 1
    else trial
    for trial in trials
  ]


def _refuse_repeated(trials: Sequence[Trial]) -> None:
  """Raises UserError if two trials are one, by fields that change nothing of what is learned."""
  times = collections.Counter(trial.digest for trial in trials)
  first: dict[str, Trial] = {}
  for trial in trials:
    other = first.setdefault(trial.digest, trial)
    if other is trial:
      continue
    if other.name == trial.name:
      raise UserError(
        f'trial {trial.name}: occurs {times[trial.digest]} times; give each value once'
      )
    raise UserError(f'trial {trial.name}: {_repeats(trial, other)}')


def _refuse_ambiguous(trials: Sequence[Trial]) -> None:
  """Raises UserError if two arms have one name, by which their losses would be averaged."""
  first: dict[str, Trial] = {}
  for trial in trials:
    other = first.setdefault(trial.arm, trial)
    if other.arm_digest != trial.arm_digest:
      raise UserError(
        f'trial {trial.name}: its arm is called {trial.arm}, as is one with other settings; give '
        'one of the two another name'
      )


def _repeats(trial: Trial, other: Trial) -> str:
  """That a trial does what another does, whatever they differ in, and the cure."""
  fields = sorted(
    name
    for name in {*trial.fields, *other.fields}
    if config_lib.field(trial.config, name) != config_lib.field(other.config, name)
  )
  again = f'is trial {other.name} again; give one of the two'
  if not fields:
    return again
  return f'{" and ".join(fields)} makes no difference to what is learned there, so it {again}'


def _folded(name: str) -> str:
  return unicodedata.normalize('NFC', name).casefold()


def _make(config: ConfigDict, arm: str, fields: Mapping[str, Any], implied: set[str]) -> Trial:
  """One trial; `implied` are the fields that the arm's name stands for."""
  label = _label({k: v for k, v in fields.items() if k not in implied}, arm)
  if any(unicodedata.category(letter) in ('Cc', 'Cs', 'Zl', 'Zp') for letter in label):
    raise UserError(f'trial {label!a}: a name is one line of text; name it otherwise')
  trial = config.copy_and_resolve_references()
  typed = {name: _typed(trial, name, value, label) for name, value in fields.items()}
  for name, value in typed.items():
    trial.update_from_flattened_dict({name: value})
  try:
    config_lib.validate(trial)
  except UserError as error:
    raise UserError(f'trial {label}: {error}') from error
  shown = {name: value for name, value in typed.items() if name not in implied}
  of_arm = {name: value for name, value in shown.items() if name not in REPEATED}
  name = file_name(_label(shown, arm))
  return Trial(name, _label(of_arm, arm) or trial.attention, typed, trial)


def _label(fields: Mapping[str, Any], arm: str = '') -> str:
  """The arm's name and the fields, in one order however they were given."""
  named = sorted(fields.items(), key=lambda field: (field[0] in REPEATED, field[0]))
  return ','.join([*([arm] if arm else []), *(f'{name}={value}' for name, value in named)])


def file_name(label: str) -> str:
  """A label as one safe file name; one that had to be changed carries a hash of what it was."""
  safe = re.sub(r'[^\w.=,+-]', '_', label).lstrip('.')
  safe = safe.encode()[:LONGEST].decode(errors='ignore') or 'trial'
  return safe if safe == label else f'{safe}-{hashlib.sha256(label.encode()).hexdigest()[:8]}'


def _typed(config: ConfigDict, name: str, value: Any, label: str) -> Any:
  """The value in the type that the config has there."""
  try:
    there = config_lib.field(config, name)
  except UserError as error:
    raise UserError(f'trial {label}: {name}: no such field; see configs/base.py') from error
  if isinstance(there, ConfigDict):
    raise UserError(f'trial {label}: {name}: is a group of fields; name one of them')
  kind = type(there)
  if kind not in (str, int, float):
    raise UserError(f'trial {label}: {name}: is {kind.__name__}, which no sweep can set')
  try:
    if kind is str:
      return str(value)
    number = float(value)
    if isinstance(value, bool) or (kind is int and number != int(number)):
      raise ValueError
    return int(number) if kind is int else number
  except (ValueError, OverflowError, TypeError) as error:
    wanted = 'an integer' if kind is int else 'a number'
    raise UserError(f'trial {label}: {name}={value}: must be {wanted}') from error


def find_workdirs(folder: Path) -> dict[str, str]:
  """{digest: folder's name} of the runs in DIR/trials; what has no config to be read is none."""
  found = {}
  for path in sorted((folder / 'trials').glob('*/config.json')):
    with contextlib.suppress(UserError):
      found[digest(read_config(path.parent), path.parent)] = path.parent.name
  return found


def _is_sweep(folder: Path) -> bool:
  held = {path.name for path in folder.iterdir()}
  # Of one that was stopped before its first trial began, only what its engine writes is there.
  return held <= {'.lock', 'logs', 'ray', 'starts'} or bool(held & {'trials', 'results.jsonl'})


def check_folder(folder: Path) -> None:
  """UserError if what is there, where anything is, is no sweep."""
  try:
    ours = not folder.exists() or (folder.is_dir() and _is_sweep(folder))
  except OSError as error:
    raise files.cannot(f'--workdir={folder}: cannot be read', error, 'choose another') from error
  if not ours:
    raise UserError(f'--workdir={folder}: is not empty and holds no sweep; choose another folder')


def check(
  trials: Sequence[Trial], folder: Path, *, on_these_devices: bool = True
) -> list[dict[str, Any]]:
  """What only building a model, reading the text or looking at the sweep's folder can tell.

  With on_these_devices, also whether the trials' meshes fit this process's devices. Returns their
  lines, with the digest of the text and tokenizer that lie here (data_digest). Raises UserError,
  naming the trial where it is one's, before anything trains.
  """
  check_folder(folder)
  texts: dict[str, Data] = {}
  models: dict[str, Any] = {}
  shapes: dict[str, str] = {}  # the models', to find equal ones by
  first: dict[str, Trial] = {}
  lines = []
  for trial in trials:
    try:
      check_workdir(trial.config, folder / 'trials' / trial.name)
      if trial.arm not in models and on_these_devices:
        mesh = memory.training_mesh(trial.config)
        backends.check(trial.config.attention_impl, mesh)
        memory.check_training(trial.config, mesh)
      source = json.dumps(trial.config.data.to_dict(), sort_keys=True)
      if source not in texts:
        texts[source] = load_data(trial.config)
      lines.append({**trial.line, 'data_digest': texts[source].digest[:16]})
      if trial.arm not in models:
        models[trial.arm] = _check_arm(trial.config, texts[source], on_these_devices)
        shapes[trial.arm] = repr(models[trial.arm])
      rest = learned(trial.config)
      rest = {name: value for name, value in rest.items() if name not in MODEL_FIELDS}
      other = first.setdefault(hash_of({'rest': rest, 'shapes': shapes[trial.arm]}), trial)
      if other is not trial and models[other.arm] == models[trial.arm]:
        raise UserError(_repeats(trial, other))
    except UserError as error:
      raise UserError(f'trial {trial.name}: {error}') from error
  return lines


def _check_arm(config: ConfigDict, data: Data, on_these_devices: bool) -> Any:
  """Returns the model in abstract: equal ones compute the same from the same weights."""
  model = nnx.eval_shape(lambda: model_lib.make_model(config, data.tokenizer.vocab_size))
  train_batches(data.train, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
  eval_windows(data.validation, seq_len=config.seq_len, max_tokens=config.data.eval_tokens)
  if on_these_devices:
    sharding.check_batch(config, memory.training_mesh(config))
  return nnx.split(model)
