"""A model's config.json in transformers' words, and ours, both ways.

What we have no way to compute is refused by its name. What is refused is what transformers itself
obeys in a model of that type; other keys it ignores, and so do we.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mla import config as config_lib
from mla import rope_scaling
from mla.attention import nested
from mla.attention.grouped import key_heads
from mla.convert.layouts import Scales
from mla.errors import UserError

# The window of an imported run's evaluation, or the model's context if that is shorter.
WINDOW = 2048

# By our attention: the formats it can be written as, the first by default.
FORMATS = {
  'mha': ('llama',),
  'gqa': ('llama',),
  'mqa': ('llama',),
  'mla': ('deepseek_v3', 'deepseek_v2'),
}
CLASSES = {
  'llama': 'LlamaForCausalLM',
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
}
READ = (*CLASSES, 'minicpm3')


class Imported(NamedTuple):
  """What a foreign config says: ours, and how its weights lie."""

  config: ConfigDict
  vocab: int
  interleaved: bool
  scales: Scales
  bos: int | None


def from_theirs(found: dict[str, Any], base: ConfigDict, path: Path) -> Imported:
  """The run that their config.json, at `path`, describes, on the fields of `base`.

  UserError that names the key that can't be represented, is missing or has a foreign type.
  """
  their = _Keys(found, path)
  kind = found.get('model_type')
  if kind not in READ:
    raise their.refusal('model_type', f'is not read; those that are: {", ".join(READ)}')
  _refuse_what_we_lack(their, kind)
  config = base.copy_and_resolve_references()
  heads, width = their.count('num_attention_heads'), their.count('hidden_size')
  config.update(
    {
      'num_heads': heads,
      'd_model': width,
      'num_layers': their.count('num_hidden_layers'),
      'ffn_dim': their.count('intermediate_size'),
      'norm_eps': their.number('rms_norm_eps', 1e-6),
      'tie_embeddings': their.flag('tie_word_embeddings', kind == 'minicpm3'),
      'seq_len': min(their.count('max_position_embeddings', WINDOW), WINDOW),
    }
  )
  interleaved, scales = False, Scales()
  if kind == 'llama':
    config.head_dim = their.count('head_dim', width // heads)
    config.value_head_dim = config.rope_dim = config.latent_dim = config.query_latent_dim = 0
    groups = their.count('num_key_value_heads', heads)
    config.attention = {heads: 'mha', 1: 'mqa'}.get(groups, 'gqa')
    config.num_kv_heads = groups if config.attention == 'gqa' else 0
  else:
    interleaved = kind == 'deepseek_v2' or (
      kind == 'deepseek_v3' and their.flag('rope_interleave', True)
    )
    config.attention, config.num_kv_heads = 'mla', 0
    config.head_dim = their.count('qk_nope_head_dim')
    config.rope_dim = their.count('qk_rope_head_dim')
    config.value_head_dim = their.count('v_head_dim')
    config.latent_dim = their.count('kv_lora_rank')
    query = found.get('q_lora_rank')
    config.query_latent_dim = 0 if query is None else their.count('q_lora_rank')
  if kind == 'minicpm3':
    depth = their.number('scale_depth', math.sqrt(config.num_layers))
    scales = Scales(
      embedding=their.number('scale_emb', 1.0),
      branch=depth / math.sqrt(config.num_layers),
      out=their.number('dim_model_base', width) / width,
    )
  config.rope_base, config.rope_scaling = _rotation(their)
  vocab = their.count('vocab_size')
  try:
    config_lib.validate(config)
  except UserError as error:
    raise UserError(f'{path}: describes a model with {error}') from error
  bos = found.get('bos_token_id')
  return Imported(config, vocab, interleaved, scales, bos if isinstance(bos, int) else None)


def _refuse_what_we_lack(their: '_Keys', kind: str) -> None:
  found = their.found
  layers = their.count('num_hidden_layers')
  for key in ('attention_bias', 'mlp_bias'):
    if found.get(key):
      raise their.refusal(key, 'our projections have no bias')
  if found.get('hidden_act', 'silu') not in ('silu', 'swish'):
    raise their.refusal('hidden_act', 'our feed-forward part is SwiGLU, with silu')
  if found.get('sliding_window') and found.get('use_sliding_window', True):
    raise their.refusal('sliding_window', 'our attention sees the whole context')
  types = found.get('layer_types') or []
  if any(of != 'full_attention' for of in types):
    raise their.refusal('layer_types', 'our layers are all of full attention')
  if found.get('quantization_config'):
    raise their.refusal('quantization_config', 'only unquantised weights are read')
  for key in ('num_local_experts', 'num_experts'):
    if kind == 'llama' and found.get(key):
      raise their.refusal(key, 'we have no mixture of experts')
  if kind in ('deepseek_v2', 'deepseek_v3'):
    dense = found.get('first_k_dense_replace', 0 if kind == 'deepseek_v2' else 3)
    if not isinstance(dense, int) or dense < layers:
      raise their.refusal(
        'first_k_dense_replace',
        f'the layers from there to num_hidden_layers={layers} have experts, which we lack',
      )
  groups = found.get('num_key_value_heads')
  if kind != 'llama' and groups not in (None, their.count('num_attention_heads')):
    raise their.refusal('num_key_value_heads', "MLA's latent is shared by all heads")


def _rotation(their: '_Keys') -> tuple[float, str]:
  """rope_base and rope_scaling."""
  found = dict(their.found)
  rope = dict(found.get('rope_scaling') or {}) | dict(found.get('rope_parameters') or {})
  base = rope.get('rope_theta', found.get('rope_theta', 10_000.0))
  keys = _Keys({**rope, 'rope_theta': base}, their.path)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  partial = rope.get('partial_rotary_factor', found.get('partial_rotary_factor', 1.0))
  if partial != 1.0:
    raise keys.refusal('partial_rotary_factor', 'heads of this layout turn whole', partial)
  numbers: dict[str, float] = {}
  if kind == 'default':
    return keys.number('rope_theta'), 'none'
  original = keys.number('original_max_position_embeddings', found.get('max_position_embeddings'))
  if kind == 'llama3':
    numbers = {
      'factor': keys.number('factor'),
      'original': original,
      'low': keys.number('low_freq_factor'),
      'high': keys.number('high_freq_factor'),
    }
  elif kind == 'yarn':
    numbers = {
      'factor': keys.number('factor'),
      'original': original,
      'beta_fast': keys.number('beta_fast', 32.0),
      'beta_slow': keys.number('beta_slow', 1.0),
      'mscale': 1.0,
      'mscale_all_dim': 0.0,
    }
    # transformers takes both into account, or neither.
    if rope.get('mscale') and rope.get('mscale_all_dim'):
      numbers['mscale'] = keys.number('mscale')
      numbers['mscale_all_dim'] = keys.number('mscale_all_dim')
    elif rope.get('mscale_all_dim'):
      raise keys.refusal('mscale_all_dim', 'means different things to different programs alone')
    if not rope.get('truncate', True):
      raise keys.refusal('truncate', "our ramp's ends are rounded")
    given = rope.get('attention_factor')
    factor = rope_scaling.Scaling(kind, numbers).amplitude()
    if given is not None and not math.isclose(keys.number('attention_factor'), factor):
      raise keys.refusal('attention_factor', f'ours follows from factor and mscale: {factor:.6g}')
  else:
    raise keys.refusal('rope_type', 'is not read; those that are: default, yarn, llama3', kind)
  text = rope_scaling.spell(kind, numbers)
  rope_scaling.parse(text)
  return keys.number('rope_theta'), text


class _Keys:
  """Their keys, each with its type checked."""

  def __init__(self, found: dict[str, Any], path: Path):
    self.found, self.path = found, path

  def refusal(self, key: str, why: str, value: Any = None) -> UserError:
    shown = self.found.get(key) if value is None else value
    return UserError(f'{self.path}: {key}={shown}: {why}')

  def count(self, key: str, default: int | None = None) -> int:
    value = self._given(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise self.refusal(key, 'must be a positive integer')
    return value

  def number(self, key: str, default: int | float | None = None) -> float:
    value = self._given(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise self.refusal(key, 'must be a number')
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    value = self._given(key, default)
    if not isinstance(value, bool):
      raise self.refusal(key, 'must be true or false')
    return value

  def _given(self, key: str, default: Any) -> Any:
    value = self.found.get(key)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{self.path}: {key} is missing; fetch the file again')
    return value


def to_theirs(config: ConfigDict, kind: str, vocab: int, bos: int) -> dict[str, Any]:
  """The config.json of a run with a solved ffn_dim, as `kind` of FORMATS[config.attention].

  UserError that names the field that the format has no word for.
  """
  heads, values = config.num_heads, config.value_head_dim or config.head_dim
  _refuse_what_they_lack(config, kind, values)
  their = {
    'architectures': [CLASSES[kind]],
    'model_type': kind,
    'dtype': 'float32',
    'vocab_size': vocab,
    'hidden_size': config.d_model,
    'intermediate_size': config.ffn_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': heads,
    'hidden_act': 'silu',
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'max_position_embeddings': config.seq_len,
    'bos_token_id': bos,
    'eos_token_id': bos,  # a document's end is the next one's start
    'rope_theta': config.rope_base,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_base},
  }
  scaling = rope_scaling.parse(config.rope_scaling)
  if scaling.kind != 'none':
    rope = _their_scaling(scaling)
    # rope_scaling is what programs read that don't know rope_parameters yet.
    their['rope_scaling'] = rope
    their['rope_parameters'] = {**rope, 'rope_theta': config.rope_base}
    stretched = int(rope['factor'] * rope['original_max_position_embeddings'])
    their['max_position_embeddings'] = max(config.seq_len, stretched)
  if kind == 'llama':
    return {
      **their,
      'head_dim': config.head_dim,
      'num_key_value_heads': key_heads(config),
      'mlp_bias': False,
    }
  their |= {
    'num_key_value_heads': heads,
    'first_k_dense_replace': config.num_layers,
    'kv_lora_rank': config.latent_dim,
    'q_lora_rank': config.query_latent_dim or None,
    'qk_nope_head_dim': config.head_dim,
    'qk_rope_head_dim': config.rope_dim,
    'v_head_dim': values,
  }
  if kind == 'deepseek_v3':
    # DeepSeek's own layout, the one that every server of its models expects.
    their |= {'rope_interleave': True, 'num_nextn_predict_layers': 0}
  return their


def _refuse_what_they_lack(config: ConfigDict, kind: str, values: int) -> None:
  def refuse(name: str, why: str) -> None:
    raise UserError(f'{name}={config[name]}: {why}, so the run cannot be exported as {kind}')

  if kind != 'llama' and not config.latent_norm:
    refuse('latent_norm', "DeepSeek's models norm their latents")
  least, *wider = nested.widths_of(config) or (0,)
  if wider:
    why = (
      f'each block of its latent has a norm of its own, and only the first, --latent_dim={least}'
    )
    raise UserError(f'nested={config.nested}: {why}, can be exported as {kind}')
  if kind == 'llama':
    if values != config.head_dim:
      refuse('value_head_dim', "a Llama's values are as wide as its keys")
    if config.rope_dim not in (0, config.head_dim):
      refuse('rope_dim', "a Llama's heads turn whole")
  if kind != 'deepseek_v3' and config.d_model % config.num_heads:
    refuse('num_heads', f'does not divide d_model={config.d_model}, which transformers asks for')
  numbers = rope_scaling.parse(config.rope_scaling).numbers
  own, all_dims = numbers.get('mscale', 1), numbers.get('mscale_all_dim', 0)
  if (own == 0 or all_dims == 0) and (own, all_dims) != (1, 0):
    refuse('rope_scaling', 'transformers ignores mscale and mscale_all_dim where one of them is 0')


def _their_scaling(scaling: rope_scaling.Scaling) -> dict[str, Any]:
  """rope_parameters, but for rope_theta."""
  words = {
    'factor': 'factor',
    'original': 'original_max_position_embeddings',
    'low': 'low_freq_factor',
    'high': 'high_freq_factor',
  }
  rope: dict[str, Any] = {'rope_type': scaling.kind}
  for name, number in scaling.numbers.items():
    rope[words.get(name, name)] = int(number) if name == 'original' else number
  if not rope.get('mscale_all_dim', 1):
    del rope['mscale'], rope['mscale_all_dim']
  return rope


def gguf_keys(
  fields: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
  """A GGUF file's fields as the keys that from_theirs reads; UserError for what is no Llama."""
  architecture = fields.get('general.architecture')
  if architecture != 'llama':
    raise UserError(f'{path}: general.architecture={architecture}: is not read; only llama is')
  for name, value in fields.items():
    refused = ('llama.expert', 'llama.rope.scaling', 'llama.attention.sliding_window')
    if name.startswith(refused) and value not in (0, 'none'):
      raise UserError(f'{path}: {name}={value}: is not read of a GGUF file')
  heads = fields.get('llama.attention.head_count')
  keys = {
    'model_type': 'llama',
    'vocab_size': (shapes.get('token_embd.weight') or (None,))[0],
    'hidden_size': fields.get('llama.embedding_length'),
    'intermediate_size': fields.get('llama.feed_forward_length'),
    'num_hidden_layers': fields.get('llama.block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': fields.get('llama.attention.head_count_kv', heads),
    'head_dim': fields.get('llama.attention.key_length'),
    'max_position_embeddings': fields.get('llama.context_length'),
    'rms_norm_eps': _shortest(fields.get('llama.attention.layer_norm_rms_epsilon')),
    'rope_theta': _shortest(fields.get('llama.rope.freq_base', 10_000.0)),
    'tie_word_embeddings': 'output.weight' not in shapes,
    'bos_token_id': fields.get('tokenizer.ggml.bos_token_id'),
  }
  turned = fields.get('llama.rope.dimension_count')
  whole = keys['head_dim'] or (keys['hidden_size'] or 0) // (heads or 1)
  if turned not in (None, whole):
    raise UserError(f"{path}: llama.rope.dimension_count={turned}: a Llama's heads turn whole")
  return keys


def _shortest(value: Any) -> Any:
  """A float32 as its publisher wrote it, 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value
