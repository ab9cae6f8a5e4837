"""Decoding: time a token with a full cache, ours against transformers with the same weights.

python -m bench.decode [--rounds=3] [--variants=mha,mla] [--batch=8] [--contexts=512,2048,8192]
                       [--cache_dtype=float32] [--json=FILE]

The whole small model, float32. Both read prompts of `context` tokens, then generate greedily; only
the generation is timed, ours as one compiled loop with a donated cache. The first tokens of both
must be equal, if the cache is float32, or nothing is reported. Ours is run on one device, and over
those that backends.prepare sets if more; transformers is run with its dynamic cache (sdpa and
eager) and its static one, plain and under torch.compile where there is a C++ compiler; its best
counts. For MLA, `expanded` is our own model made to expand keys and values from its cache at every
step.
"""

import shutil
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np

from bench import harness

PREFILL = 512  # tokens a chunk of the peer's prefill
CHECKED = 8  # generated tokens that must be equal
PEER_SETTINGS = (
  'sdpa, dynamic cache',
  'eager, dynamic cache',
  'sdpa, static cache',
  'sdpa, static cache compiled',
)


def prompts_of(case: dict) -> np.ndarray:
  shape = (case['batch'], case['context'])
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


def ours(case: dict) -> dict:
  import jax
  import jax.numpy as jnp

  from bench import generation
  from mla import backends
  from mla.attention.latent import LatentAttention
  from mla.model import allocate_cache, make_model, prefill

  backends.prepare(case['batch'])
  model = make_model(generation.small_config(case['variant']), 257)
  prompts = prompts_of(case)
  lengths = np.full(case['batch'], case['context'], np.int32)
  fill = jax.jit(prefill, donate_argnums=1)

  def measure(devices: int) -> dict:
    slots = case['context'] + generation.SLOTS
    empty = allocate_cache(model, batch=case['batch'], slots=slots, dtype=case['cache_dtype'])
    mesh = generation.mesh_of(devices)
    with jax.set_mesh(mesh):
      placed, cache = generation.place(model, empty, mesh)
      logits, cache = fill(placed, cache, prompts, lengths)
      start = (cache, jnp.argmax(logits, -1))
      ((figures, tokens),) = generation.time_generation(placed, [start])
    return {**figures, 'first_tokens': tokens[0][:, :CHECKED].tolist()}

  latent = isinstance(model.blocks.attention, LatentAttention)
  forms = ['absorbed', 'expanded'] if latent else ['cached']
  results = {}
  for form in forms:
    jax.clear_caches()  # or jit would take the other form's trace again
    attend = expanded if form == 'expanded' else LatentAttention.attend_cached
    with mock.patch.object(LatentAttention, 'attend_cached', attend):
      for devices in sorted({1, jax.device_count()}):
        results[f'{form}, devices={devices}'] = measure(devices)
  return results


def expanded(self, x, cached, positions):
  """LatentAttention.attend_cached as it would be without absorption."""
  import jax.numpy as jnp

  from mla.backends import cached_attention
  from mla.cache import Stored
  from mla.layers import project

  latent = cached['latent'].values.astype(x.dtype)
  k_nope = project(latent, self.w_uk).swapaxes(1, 2)  # [B, H, S, N]
  values = project(latent, self.w_uv).swapaxes(1, 2)
  k_rope = cached['k_rope'].values.astype(x.dtype)[:, None]
  k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
  keys = jnp.concatenate([k_nope, k_rope], axis=-1)
  query = jnp.concatenate(self._queries(x, positions), axis=-1)
  out = cached_attention(
    [query], [Stored(keys, None)], [Stored(values, None)], positions, scale=self.scale
  )
  return project(out, self.w_o, inputs=2)


def peer(case: dict) -> dict:
  import torch

  from bench.generation import small_config
  from bench.peers import make_peer
  from mla.model import make_model

  torch.set_num_threads(harness.cores())
  config = small_config(case['variant'])
  ours = make_model(config, 257)
  prompts = torch.tensor(prompts_of(case), dtype=torch.long)
  models = {name: make_peer(config, ours, name).eval() for name in ('sdpa', 'eager')}
  return time_peers(models, prompts)


def time_peers(models: Mapping[str, Any], prompts: Any) -> dict[str, dict]:
  """Greedy generation after [B,T] prompts by transformers' models, in each setting."""
  import torch
  import transformers

  from bench.generation import REPEATS, SLOTS, STEPS

  context = prompts.shape[1]
  slots = context + SLOTS
  results = {}
  for setting in PEER_SETTINGS if shutil.which('c++') else PEER_SETTINGS[:-1]:
    attention, kind = setting.split(', ')
    model: Any = models[attention]
    if kind == 'dynamic cache':
      cache: Any = transformers.DynamicCache(config=model.config)
    else:
      cache = transformers.StaticCache(config=model.config, max_cache_len=slots)
    with torch.inference_mode():
      for start in range(0, context, PREFILL):
        chunk = prompts[:, start : start + PREFILL]
        out = models['sdpa'](chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
      step = torch.compile(model) if kind == 'static cache compiled' else model
      token = out.logits[:, -1].argmax(-1, keepdim=True)
      times, tokens = [], []
      began = time.perf_counter()
      for index in range(STEPS * (REPEATS + 1)):
        if index % STEPS == 0:
          times.append(time.perf_counter())
        tokens.append(token)
        token = step(token, past_key_values=cache, use_cache=True).logits[:, -1]
        token = token.argmax(-1, keepdim=True)
      times.append(time.perf_counter())
    results[setting] = {
      'ms_per_token': 1e3 * float(np.diff(times)[1:].min()) / STEPS,
      'first_16_tokens_seconds': times[1] - began,
      'first_tokens': torch.cat(tokens[:CHECKED], dim=1).tolist(),
    }
  return results


def main() -> None:
  args = harness.arguments(
    {'ours': ours, 'peer': peer},
    rounds=3,
    variants='mha,mla',
    batch=8,
    contexts='512,2048,8192',
    cache_dtype='float32',
  )
  rows = []
  for variant in args.variants.split(','):
    for context in map(int, args.contexts.split(',')):
      case = {
        'variant': variant,
        'batch': args.batch,
        'context': context,
        'cache_dtype': args.cache_dtype,
      }
      row = harness.side_by_side('bench.decode', case, args.rounds, 'ms_per_token', better=min)
      settings = row['all_settings']
      firsts = [s['first_tokens'] for side in settings.values() for s in side.values()]
      if args.cache_dtype == 'float32' and any(first != firsts[0] for first in firsts):
        raise AssertionError(f'{variant}: ours and peer do not generate the same tokens')
      what = f'decode, batch {args.batch}, context {context}, {args.cache_dtype} cache'
      rows.append({'variant': variant, 'what': what, 'unit': 'ms/token', **row})
      own = settings['ours']
      if any(name.startswith('absorbed') for name in own):
        forms = {
          form: min(own[name]['ms_per_token'] for name in own if name.startswith(form))
          for form in ('absorbed', 'expanded')
        }
        row = harness.one_ratio(
          forms['absorbed'],
          forms['expanded'],
          'ours, expanded',
          forms['expanded'] / forms['absorbed'],
        )
        rows.append({'variant': variant, 'what': what, 'unit': 'ms/token', **row})
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
