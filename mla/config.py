"""Every rule a config must keep, each with an error that names the field and the cure; and the
schema of config.json.

The rules that only one variant has stand with it, in mla/attention.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mla import probes, rope_scaling
from mla.attention import VARIANTS
from mla.errors import UserError, first_line
from mla.fields import field as field
from mla.fields import flatten as flatten
from mla.fields import unknown_field as unknown_field

DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'latents', 'block', 'full')
ATTENTION_IMPLS = ('auto', 'blockwise', 'cpu', 'cudnn', 'splash')
PACKINGS = ('', 'documents')

POSITIVE = (
  'num_heads head_dim num_layers d_model param_budget seq_len batch_size accumulation_steps '
  'num_steps eval_every checkpoint_every checkpoints_kept log_every data.eval_tokens data.records '
  'data.attributes data.alphabet'
).split()
NOT_NEGATIVE = 'value_head_dim ffn_dim warmup_steps seed'.split()
OF_VARIANTS = tuple(dict.fromkeys(name for its in VARIANTS.values() for name in its.fields))
TEXTS = (
  'attention attention_impl nested dtype remat data.dataset data.text_key data.train_split '
  'data.validation_split data.data_dir data.files data.validation_files data.tokenizer '
  'data.packing rope_scaling'
).split()
GROUPS = ('data', 'mesh')
MESH = ('mesh.data', 'mesh.fsdp', 'mesh.tensor')
FLOATS = ('learning_rate', 'grad_clip', 'weight_decay', 'rope_base', 'embedding_std', 'norm_eps')
LARGEST = 2**31 - 1  # sizes and counts must stay within int32

# Of config.json; raise it with every field that is added, so that an older program refuses what it
# would misread. Version 0 did not write its number.
SCHEMA_VERSION = 3
# Fields that came after version 0, each with what runs did before: what an older run's config.json
# is filled with. At this value a field is no difference between two runs.
ADDED: dict[str, Any] = {
  'attention_impl': 'auto',
  'data.train_split': 'train',
  'embedding_std': 0.15,
  'rope_scaling': 'none',
  'norm_eps': 1e-6,
  'tie_embeddings': False,
  'latent_norm': True,
  'round_to': 0,
  'nested': '',
  'data.records': 16,
  'data.attributes': 1,
  'data.alphabet': 16,
  'data.packing': '',
}
FIELDS = {*POSITIVE, *NOT_NEGATIVE, *OF_VARIANTS, *TEXTS, *MESH, *FLOATS, *ADDED}


def validate(config: ConfigDict) -> None:
  """Raises UserError on the first rule that config breaks."""
  for group in GROUPS:
    is_group = isinstance(field(config, group), ConfigDict)
    _require(is_group, group, config, 'must be a group of fields; see configs/base.py')
  for name in flatten(config):
    if name not in FIELDS:
      raise unknown_field(name, FIELDS)
  _check_choices(config)
  _check_numbers(config)
  probes.parse(config)
  for holds, name, cure in VARIANTS[config.attention].rules(config):
    _require(holds, name, config, cure)
  _check_training(config)
  _check_mesh(config)


def to_json(config: ConfigDict) -> dict[str, Any]:
  """What config.json holds."""
  return {'schema_version': SCHEMA_VERSION, **config.to_dict()}


def from_json(found: Any, path: Path) -> ConfigDict:
  """The config of what config.json, at `path`, holds; UserError if it breaks a rule.

  Fields that came after it are filled in.
  """
  cure = 'restore it or train again elsewhere'
  if not isinstance(found, dict):
    raise UserError(f'{path}: cannot be read as a config, for it is no JSON object; {cure}')
  version = found.pop('schema_version', 0)
  if not _is_integer(version) or version < 0:
    raise UserError(f'{path}: schema_version={version}: must be an integer; {cure}')
  if version > SCHEMA_VERSION:
    raise UserError(
      f'{path}: schema_version={version}: a later version of this program wrote it, and this one '
      f'reads up to {SCHEMA_VERSION}; update the program'
    )
  try:
    config = ConfigDict(found)
  except Exception as error:  # whatever names that a ConfigDict cannot have make it raise
    raise UserError(f'{path}: no config can be made of it ({first_line(error)}); {cure}') from error
  try:
    for name, value in ADDED.items():
      group, _, key = name.rpartition('.')
      fields = config.get(group) if group else config
      if isinstance(fields, ConfigDict) and key not in fields:
        fields[key] = value
    validate(config)
  except UserError as error:
    raise UserError(f'{path}: {error}; {cure}') from error
  return config


def _require(holds: bool, name: str, config: ConfigDict, cure: str) -> None:
  if not holds:
    raise UserError(f'{name}={field(config, name)}: {cure}')


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _in_float32(value: Any) -> float:
  """The number as the devices will have it, tiny ones as 0; NaN if it is none, or not finite."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return math.nan
  try:
    with np.errstate(over='ignore', under='ignore'):
      number = float(np.float32(value))
  except OverflowError:  # an integer of hundreds of digits
    return math.nan
  if not math.isfinite(number):
    return math.nan
  return number if abs(number) >= np.finfo(np.float32).tiny else 0.0


def _check_numbers(config: ConfigDict) -> None:
  own = VARIANTS[config.attention].fields
  not_negative = [*NOT_NEGATIVE, *(name for name in OF_VARIANTS if name in config or name in own)]
  for name in (*POSITIVE, *not_negative, *MESH):
    _require(_is_integer(field(config, name)), name, config, 'must be an integer')
  for name in POSITIVE:
    _require(0 < field(config, name) <= LARGEST, name, config, 'must be a positive integer')
  for name in not_negative:
    _require(0 <= field(config, name) <= LARGEST, name, config, 'must be 0 or a positive integer')
  for name in FLOATS:
    finite = not math.isnan(_in_float32(field(config, name)))
    _require(finite, name, config, 'must be a number that is finite in float32')
  small = 'must be positive, and in float32 too (at least 1.2e-38)'
  for name in ('learning_rate', 'grad_clip', 'embedding_std', 'norm_eps'):
    _require(_in_float32(config[name]) > 0, name, config, small)
  decay = config.weight_decay
  _require(decay == 0 or _in_float32(decay) > 0, 'weight_decay', config, f'0, or {small}')
  _require(
    _in_float32(config.rope_base) > 1, 'rope_base', config, 'must be above 1, in float32 too'
  )


def _check_choices(config: ConfigDict) -> None:
  for name in TEXTS:
    _require(isinstance(field(config, name), str), name, config, 'must be a string')
  choices_of = {
    'attention': tuple(VARIANTS),
    'dtype': DTYPES,
    'remat': REMATS,
    'attention_impl': ATTENTION_IMPLS,
    'data.packing': PACKINGS,
  }
  for name, choices in choices_of.items():
    told = ', '.join(choice or "''" for choice in choices)
    _require(field(config, name) in choices, name, config, f'choose one of {told}')
  for name in ('tie_embeddings', 'latent_norm'):
    _require(isinstance(config[name], bool), name, config, 'must be True or False')
  rope_scaling.parse(config.rope_scaling)


def _check_training(config: ConfigDict) -> None:
  cure = f'must divide batch_size={config.batch_size}'
  _require(config.batch_size % config.accumulation_steps == 0, 'accumulation_steps', config, cure)
  cure = f'must be below num_steps={config.num_steps}'
  _require(config.warmup_steps < config.num_steps, 'warmup_steps', config, cure)


def _check_mesh(config: ConfigDict) -> None:
  for axis in ('data', 'fsdp', 'tensor'):
    size, name = config.mesh[axis], f'mesh.{axis}'
    if axis == 'fsdp':
      _require(
        size >= -1, name, config, 'must be positive, 0 for what is needed, or -1 for the rest'
      )
    else:
      _require(size == -1 or size > 0, name, config, 'must be positive, or -1 for the rest')
  free = [axis for axis, size in config.mesh.items() if size == -1]
  if len(free) > 1:
    raise UserError(f'mesh.{free[1]}=-1: only one axis can take what is left; give a number')
