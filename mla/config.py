"""Every rule a config must keep, each with an error that names the field and the cure.

But one: that `attention` names a variant, which mla/attention knows.
"""

import math

from ml_collections import ConfigDict

from mla.errors import UserError

DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'latents', 'full')
ATTENTION_IMPLS = ('auto', 'blockwise', 'cpu')

POSITIVE = (
  'num_heads head_dim num_layers d_model param_budget seq_len batch_size accumulation_steps '
  'num_steps eval_every checkpoint_every checkpoints_kept log_every data.eval_tokens'
).split()
NOT_NEGATIVE = (
  'value_head_dim num_kv_heads latent_dim rope_dim query_latent_dim ffn_dim warmup_steps seed'
).split()
TEXTS = (
  'attention attention_impl dtype remat data.dataset data.text_key data.validation_split '
  'data.data_dir data.files data.validation_files data.tokenizer'
).split()
# Fields that the config.json of an older run lacks, and what it ran with.
ADDED_SINCE = {'attention_impl': 'auto'}
LARGEST = 2**31 - 1  # sizes and counts must stay within int32


def validate(config: ConfigDict) -> None:
  """Raises UserError on the first rule that config breaks."""
  _check_numbers(config)
  _check_choices(config)
  _check_attention(config)
  _check_training(config)
  _check_mesh(config)


def field(config: ConfigDict, name: str):
  """The value of a dotted field name."""
  value = config
  for part in name.split('.'):
    if not isinstance(value, ConfigDict) or part not in value:
      raise UserError(f'{name}: the config lacks this field; see configs/base.py')
    value = value[part]
  return value


def _require(holds: bool, name: str, config: ConfigDict, cure: str) -> None:
  if not holds:
    raise UserError(f'{name}={field(config, name)}: {cure}')


def _check_numbers(config: ConfigDict) -> None:
  for name in (*POSITIVE, *NOT_NEGATIVE, 'mesh.data', 'mesh.fsdp', 'mesh.tensor'):
    _require(isinstance(field(config, name), int), name, config, 'must be an integer')
  for name in POSITIVE:
    _require(0 < field(config, name) <= LARGEST, name, config, 'must be a positive integer')
  for name in NOT_NEGATIVE:
    _require(0 <= field(config, name) <= LARGEST, name, config, 'must be 0 or a positive integer')
  for name in ('learning_rate', 'grad_clip', 'weight_decay', 'rope_base'):
    number = isinstance(field(config, name), int | float) and math.isfinite(config[name])
    _require(number, name, config, 'must be a finite number')
  for name in ('learning_rate', 'grad_clip'):
    _require(config[name] > 0, name, config, 'must be positive')
  _require(config.weight_decay >= 0, 'weight_decay', config, 'must be 0 or positive')
  _require(config.rope_base > 1, 'rope_base', config, 'must be above 1')


def _check_choices(config: ConfigDict) -> None:
  for name in TEXTS:
    _require(isinstance(field(config, name), str), name, config, 'must be a string')
  choices_of = {'dtype': DTYPES, 'remat': REMATS, 'attention_impl': ATTENTION_IMPLS}
  for name, choices in choices_of.items():
    _require(config[name] in choices, name, config, f'choose one of {", ".join(choices)}')


def _check_attention(config: ConfigDict) -> None:
  if config.attention == 'mla':
    _require(config.latent_dim > 0, 'latent_dim', config, 'mla needs the width of its latent')
    _require(config.rope_dim > 0, 'rope_dim', config, 'mla needs a shared rotary key; try 32')
  if config.attention == 'gqa':
    fits = config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads == 0
    cure = f'gqa needs a number that divides num_heads={config.num_heads}'
    _require(fits, 'num_kv_heads', config, cure)
  if config.attention != 'mla':
    cure = f'cannot rotate more than head_dim={config.head_dim}; 0 rotates all'
    _require(config.rope_dim <= config.head_dim, 'rope_dim', config, cure)
    if config.rope_dim == 0:
      _require(config.head_dim % 2 == 0, 'head_dim', config, 'must be even to rotate in pairs')
  _require(config.rope_dim % 2 == 0, 'rope_dim', config, 'must be even: dims rotate in pairs')


def _check_training(config: ConfigDict) -> None:
  cure = f'must divide batch_size={config.batch_size}'
  _require(config.batch_size % config.accumulation_steps == 0, 'accumulation_steps', config, cure)
  cure = f'must be below num_steps={config.num_steps}'
  _require(config.warmup_steps < config.num_steps, 'warmup_steps', config, cure)


def _check_mesh(config: ConfigDict) -> None:
  for axis in ('data', 'fsdp', 'tensor'):
    size = config.mesh[axis]
    _require(size == -1 or size > 0, f'mesh.{axis}', config, 'must be positive, or -1 for the rest')
  free = [axis for axis, size in config.mesh.items() if size == -1]
  if len(free) > 1:
    raise UserError(f'mesh.{free[1]}=-1: only one axis can take what is left; give a number')
