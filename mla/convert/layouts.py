"""Which tensor of another layout is which weight of ours, and how one becomes the other.

A layout's names are those of transformers' Llama and DeepSeek models; GGUF has its own. A Linear's
weight there is [out, in]. Where their rotary dims lie in pairs (0, 1), (2, 3), ... ours are put
into that order on the way out, and back into halves on the way in: the same rotation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mla.attention.grouped import key_heads


class Tensor(NamedTuple):
  """One of their tensors: its name and shape, the paths of our weights in it, and both ways."""

  name: str
  shape: tuple[int, ...]
  ours: tuple[str, ...]  # paths in the model, joined by '/'
  layer: int | None  # which of the stacked weights; None for those outside the blocks
  pack: Callable[..., np.ndarray]  # our arrays, in the order of `ours`
  unpack: Callable[[np.ndarray], Sequence[np.ndarray]]


class Names(NamedTuple):
  """What a layout calls things; {} is the layer's number."""

  embedding: str
  norm: str
  out: str
  layer: str
  parts: dict[str, str]  # by our path within a block


TRANSFORMERS = Names(
  'model.embed_tokens.weight',
  'model.norm.weight',
  'lm_head.weight',
  'model.layers.{}.',
  {
    'attention_norm/gain': 'input_layernorm.weight',
    'ffn_norm/gain': 'post_attention_layernorm.weight',
    'ffn/w_gate': 'mlp.gate_proj.weight',
    'ffn/w_up': 'mlp.up_proj.weight',
    'ffn/w_down': 'mlp.down_proj.weight',
    'attention/w_q': 'self_attn.q_proj.weight',
    'attention/w_k': 'self_attn.k_proj.weight',
    'attention/w_v': 'self_attn.v_proj.weight',
    'attention/w_o': 'self_attn.o_proj.weight',
    'attention/w_dq': 'self_attn.q_a_proj.weight',
    'attention/query_norm/gain': 'self_attn.q_a_layernorm.weight',
    'attention/w_uq': 'self_attn.q_b_proj.weight',
    'attention/w_dkv': 'self_attn.kv_a_proj_with_mqa.weight',  # and w_kr
    'attention/latent_norm/gain': 'self_attn.kv_a_layernorm.weight',
    'attention/w_uk': 'self_attn.kv_b_proj.weight',  # and w_uv
  },
)
GGUF = Names(
  'token_embd.weight',
  'output_norm.weight',
  'output.weight',
  'blk.{}.',
  {
    'attention_norm/gain': 'attn_norm.weight',
    'ffn_norm/gain': 'ffn_norm.weight',
    'ffn/w_gate': 'ffn_gate.weight',
    'ffn/w_up': 'ffn_up.weight',
    'ffn/w_down': 'ffn_down.weight',
    'attention/w_q': 'attn_q.weight',
    'attention/w_k': 'attn_k.weight',
    'attention/w_v': 'attn_v.weight',
    'attention/w_o': 'attn_output.weight',
  },
)


class Scales(NamedTuple):
  """Factors that a model applies while it runs, and ours has in its weights: MiniCPM3's."""

  embedding: float = 1.0
  branch: float = 1.0  # of what each attention and feed-forward part adds
  out: float = 1.0


UNSCALED = Scales()


def tensors(
  config: ConfigDict,
  vocab: int,
  names: Names = TRANSFORMERS,
  *,
  interleaved: bool,
  scales: Scales = UNSCALED,
) -> Iterator[Tensor]:
  """All tensors of the model; config.ffn_dim is not 0."""
  D, F = config.d_model, config.ffn_dim
  yield _whole(names.embedding, (vocab, D), 'embedding', None, scales.embedding)
  for layer in range(config.num_layers):
    named = {path: names.layer.format(layer) + name for path, name in names.parts.items()}
    for norm in ('attention_norm/gain', 'ffn_norm/gain'):
      yield _whole(named[norm], (D,), f'blocks/{norm}', layer)
    attend = _latent if config.attention == 'mla' else _grouped
    yield from attend(config, named, layer, interleaved, scales.branch)
    yield _linear(named, 'ffn/w_gate', (D,), (F,), layer)
    yield _linear(named, 'ffn/w_up', (D,), (F,), layer)
    yield _linear(named, 'ffn/w_down', (F,), (D,), layer, scale=scales.branch)
  yield _whole(names.norm, (D,), 'norm/gain', None)
  if not config.tie_embeddings:
    out = _linear({'w_out': names.out}, 'w_out', (D,), (vocab,), None, scale=scales.out)
    yield out._replace(ours=('w_out',))


def _grouped(config, named, layer, interleaved, branch) -> Iterator[Tensor]:
  D, H, N, K = config.d_model, config.num_heads, config.head_dim, key_heads(config)
  V = config.value_head_dim or N
  turned = N if interleaved else 0
  yield _linear(named, 'attention/w_q', (D,), (H, N), layer, turned)
  yield _linear(named, 'attention/w_k', (D,), (K, N), layer, turned)
  yield _linear(named, 'attention/w_v', (D,), (K, V), layer)
  yield _linear(named, 'attention/w_o', (H, V), (D,), layer, scale=branch)


def _latent(config, named, layer, interleaved, branch) -> Iterator[Tensor]:
  D, H, N, R = config.d_model, config.num_heads, config.head_dim, config.rope_dim
  C, Q, V = config.latent_dim, config.query_latent_dim, config.value_head_dim or config.head_dim
  turned = R if interleaved else 0
  if Q:
    yield _linear(named, 'attention/w_dq', (D,), (Q,), layer)
    gain = 'attention/query_norm/gain'
    yield _whole(named[gain], (Q,), f'blocks/{gain}', layer)
    yield _linear(named, 'attention/w_uq', (Q,), (H, N + R), layer, turned)
  else:
    yield _linear(named, 'attention/w_q', (D,), (H, N + R), layer, turned)
  gain = 'attention/latent_norm/gain'
  yield _whole(named[gain], (C,), f'blocks/{gain}', layer)
  down = _linear(named, 'attention/w_dkv', (D,), (C + R,), layer, turned)
  yield _joined(down, 'attention/w_kr', C)
  up = _linear(named, 'attention/w_uk', (C,), (H, N + V), layer)
  yield _joined(up, 'attention/w_uv', N)
  yield _linear(named, 'attention/w_o', (H, V), (D,), layer, scale=branch)


def _whole(name: str, shape: tuple[int, ...], ours: str, layer: int | None, scale: float = 1.0):
  """One that lies as ours does."""
  return Tensor(
    name, shape, (ours,), layer, lambda own: own, lambda their: (_scaled(their, scale),)
  )


def _linear(
  named: dict[str, str],
  path: str,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  layer: int | None,
  turned: int = 0,
  scale: float = 1.0,
) -> Tensor:
  """[*inputs, *outputs] as [out, in]; the last `turned` dims of the outputs' last axis rotate."""
  rows, columns = math.prod(outputs), math.prod(inputs)
  order = np.arange(outputs[-1])
  if turned:
    order[-turned:] = order[-turned:].reshape(2, -1).T.ravel()  # theirs[i] is ours[order[i]]
  back = np.argsort(order)

  def pack(own: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(own[..., order].reshape(columns, rows).T)

  def unpack(their: np.ndarray) -> tuple[np.ndarray]:
    return (_scaled(their.T.reshape(*inputs, *outputs)[..., back], scale),)

  return Tensor(named[path], (rows, columns), (f'blocks/{path}',), layer, pack, unpack)


def _joined(whole: Tensor, second: str, end: int) -> Tensor:
  """A Linear that is two of our weights, the first up to `end` of the last axis."""
  return whole._replace(
    ours=(*whole.ours, f'blocks/{second}'),
    pack=lambda *own: whole.pack(np.concatenate(own, axis=-1)),
    unpack=lambda their: tuple(np.split(whole.unpack(their)[0], [end], axis=-1)),
  )


def _scaled(values: np.ndarray, scale: float) -> np.ndarray:
  return values if scale == 1 else values * np.float32(scale)
