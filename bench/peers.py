"""The same model in Hugging Face transformers, with the same weights.

MHA, GQA and MQA are a Llama; MLA is a DeepSeek-V3 whose layers are all dense. Rotary halves lie as
ours do (rope_interleave=False).
"""

import numpy as np
import torch
import transformers
from flax import nnx
from ml_collections import ConfigDict

from mla.attention.latent import LatentAttention
from mla.model import Decoder


def make_peer(config: ConfigDict, model: Decoder, attention: str) -> torch.nn.Module:
  """A transformers model holding model's weights; `attention` is 'sdpa' or 'eager'."""
  vocab, width = model.embedding.shape
  common = {
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': model.blocks.ffn.w_up.shape[-1],
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'rms_norm_eps': 1e-6,
    'max_position_embeddings': 65536,
    'tie_word_embeddings': False,
    'attn_implementation': attention,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_base},
  }
  if isinstance(model.blocks.attention, LatentAttention):
    peer: torch.nn.Module = transformers.DeepseekV3ForCausalLM(
      transformers.DeepseekV3Config(
        **common,
        num_key_value_heads=config.num_heads,
        first_k_dense_replace=config.num_layers,
        kv_lora_rank=config.latent_dim,
        q_lora_rank=config.query_latent_dim or None,
        qk_nope_head_dim=config.head_dim,
        qk_rope_head_dim=config.rope_dim,
        v_head_dim=config.value_head_dim or config.head_dim,
        rope_interleave=False,
      )
    )
  else:
    heads, _ = model.blocks.attention.cache_shapes()['k']
    peer = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(**common, num_key_value_heads=heads, head_dim=config.head_dim)
    )
  weights = {name: torch.tensor(value) for name, value in _weights(config, model).items()}
  missing, unexpected = peer.load_state_dict(weights, strict=False)
  if missing or unexpected:
    raise ValueError(f'weights do not fit: missing {missing}, unexpected {unexpected}')
  return peer


def _weights(config: ConfigDict, model: Decoder) -> dict[str, np.ndarray]:
  """Our weights under transformers' names; a Linear's weight is [out, in]."""
  flat = {
    'model.embed_tokens.weight': np.asarray(model.embedding[...]),
    'model.norm.weight': np.asarray(model.norm.gain[...]),
    'lm_head.weight': np.asarray(model.w_out[...]).T,
  }
  for index, block in enumerate(model.layers()):
    own = {
      'input_layernorm.weight': block.attention_norm.gain,
      'post_attention_layernorm.weight': block.ffn_norm.gain,
      'mlp.gate_proj.weight': _linear(block.ffn.w_gate),
      'mlp.up_proj.weight': _linear(block.ffn.w_up),
      'mlp.down_proj.weight': _linear(block.ffn.w_down),
      'self_attn.o_proj.weight': _linear(block.attention.w_o, inputs=2),
    }
    attention = block.attention
    if isinstance(attention, LatentAttention):
      up = np.concatenate([attention.w_uk[...], attention.w_uv[...]], axis=-1)  # per head: k, v
      down = np.concatenate([attention.w_dkv[...], attention.w_kr[...]], axis=-1)
      own['self_attn.kv_a_proj_with_mqa.weight'] = down.T
      own['self_attn.kv_a_layernorm.weight'] = attention.latent_norm.gain
      own['self_attn.kv_b_proj.weight'] = _linear(up)
      if config.query_latent_dim:
        own['self_attn.q_a_proj.weight'] = _linear(attention.w_dq)
        own['self_attn.q_a_layernorm.weight'] = attention.query_norm.gain
        own['self_attn.q_b_proj.weight'] = _linear(attention.w_uq)
      else:
        own['self_attn.q_proj.weight'] = _linear(attention.w_q)
    else:
      for ours, theirs in (('w_q', 'q_proj'), ('w_k', 'k_proj'), ('w_v', 'v_proj')):
        own[f'self_attn.{theirs}.weight'] = _linear(getattr(attention, ours))
    flat |= {f'model.layers.{index}.{name}': _array(value) for name, value in own.items()}
  return flat


def _linear(weight, inputs: int = 1) -> np.ndarray:
  """[in..., out...] as [out, in]."""
  values = _array(weight)
  return values.reshape(int(np.prod(values.shape[:inputs])), -1).T


def _array(weight) -> np.ndarray:
  return np.asarray(weight[...] if isinstance(weight, nnx.Variable) else weight)
