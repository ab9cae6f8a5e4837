"""A GPU's training step and decoding: ours in bfloat16 beside transformers with SDPA, one run.

python -m bench.gpu [--variants=mha,gqa,mqa,mla] [--batch=16] [--decode_batch=32]
                    [--contexts=1024,8192] [--compiled=1] [--json=FILE]

The medium configs, weights float32, computation bfloat16 (torch: autocast), AdamW and clipping on
both sides; tokens are noise. The losses of both sides' first steps must agree to 0.02, or nothing
is reported. Model FLOPs a token are 6 a weight that multiplies and causal attention's half of the
square; MFU is that, times tokens a second, over the card's dense bfloat16 peak. The memory is what
each framework's allocator held at its highest.

Decoding is greedy, one compiled loop with a donated bfloat16 cache full of noise. Its share is the
bytes of cache and weights that a token must read, over the bytes that a copy on the card moved
(read and written) in as much time, measured in the same process.
"""

import functools
import gc
import importlib
import os
import time

import numpy as np

from bench import harness
from mla import targets

STEPS, WARM_UP = 20, 5
VOCAB = 32_000
COPY_BYTES = 2 << 30


def case_config(case: dict):
  config = importlib.import_module(f'configs.{case["variant"]}_medium').get_config()
  config.batch_size = case['batch']
  return config


def batch_of(case: dict, config) -> np.ndarray:
  shape = (case['batch'], config.seq_len + 1)
  return np.random.default_rng(0).integers(0, VOCAB, shape).astype(np.int32)


def ours(case: dict) -> dict:
  import jax
  from flax import nnx

  from mla import backends, model, sharding
  from mla import step as step_lib
  from mla.dry_run import flops_per_token
  from mla.optimizer import make_optimizer

  config = case_config(case)
  backends.prepare(case['batch'])
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  results = {}
  for remat in ('none', 'latents'):
    for impl in ('auto', 'blockwise') if remat == 'none' and case['blockwise'] else ('auto',):
      config.remat, config.attention_impl = remat, impl
      worth, _ = flops_per_token(config, VOCAB, jax.devices()[0])
      with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        create = functools.partial(step_lib.init_state, config, VOCAB, optimizer)
        placement = sharding.shardings(jax.eval_shape(create), mesh)
        state = jax.jit(create, out_shardings=placement)()
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: model.make_model(config, VOCAB)))
        step = functools.partial(step_lib.train_step, config, graphdef, optimizer)
        tokens = sharding.put_batch(batch_of(case, config), mesh)
        began = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
        compiled = jitted.lower(state, tokens).compile()
        figures: dict = {'compile_seconds': time.perf_counter() - began}
        memory = compiled.memory_analysis()
        assert memory is not None
        figures['compiler_bytes'] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        text = compiled.as_text() or ''
        figures['fused_attention'] = 'fmha' in text
        losses: list = []
        for index in range(WARM_UP + STEPS):
          if index == WARM_UP:
            losses[-1].block_until_ready()
            began = time.perf_counter()
          state, measured = compiled(state, tokens)
          losses.append(measured['loss'])
        losses[-1].block_until_ready()
        seconds = (time.perf_counter() - began) / STEPS
        figures |= {'ms': 1e3 * seconds, 'loss': float(losses[0])}
        figures['model_flops'] = worth * case['batch'] * config.seq_len
        results[f'jit, remat {remat}, {impl}'] = figures
        del state, compiled, jitted, measured, losses
        gc.collect()
  return results


def peer(case: dict) -> dict:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # only to draw the weights
  import torch

  from bench.peers import make_peer
  from mla.model import make_model

  torch.set_float32_matmul_precision('high')
  config = case_config(case)
  tokens = torch.tensor(batch_of(case, config), dtype=torch.long).cuda()
  ours = make_model(config, VOCAB)
  results = {}
  for setting in ('sdpa', 'sdpa compiled') if case['compiled'] else ('sdpa',):
    model = make_peer(config, ours, 'sdpa').cuda()
    optimizer = torch.optim.AdamW(
      model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def loss_of(tokens, model=model):
      with torch.autocast('cuda', dtype=torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits
      return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten()
      )

    if setting == 'sdpa compiled':
      loss_of = torch.compile(loss_of)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    first = None
    for index in range(WARM_UP + STEPS):
      if index == WARM_UP:
        torch.cuda.synchronize()
        compiling, began = time.perf_counter() - began, time.perf_counter()
      loss = loss_of(tokens)
      optimizer.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
      optimizer.step()
      first = float(loss) if first is None else first
    torch.cuda.synchronize()
    results[setting] = {
      'ms': 1e3 * (time.perf_counter() - began) / STEPS,
      'warm_up_seconds': compiling,
      'peak_bytes': torch.cuda.max_memory_allocated(),
      'loss': first,
    }
    del model, optimizer, loss, loss_of
    gc.collect()
    torch.cuda.empty_cache()
  return results


def decoding(case: dict) -> dict:
  """Ours only: ms a token, and the share of the copy's bandwidth."""
  import jax
  import jax.numpy as jnp

  from bench import generation
  from mla.model import make_model

  config = case_config(case)
  model = make_model(config, VOCAB)
  # Decoding in the weights' own dtype of computation: each is read once a token, as bfloat16.
  model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
  copied = copy_rate()
  results = {}
  for context in case['contexts']:
    cache = generation.noise_cache(model, case['decode_batch'], context, 'bfloat16')
    first = jnp.zeros(case['decode_batch'], jnp.int32)
    ((figures, _),) = generation.time_generation(model, [(cache, first)])
    weights = sum(x.nbytes for x in jax.tree.leaves(model)) - model.embedding[...].nbytes
    moved = cache_bytes(figures, context) + weights
    results[str(context)] = {
      'ms': figures['ms_per_token'],
      'compile_seconds': figures['compile_seconds'],
      'cache_bytes_per_token': figures['cache_bytes'] / case['decode_batch'] / slots(context),
      'bytes_read': moved,
      'copy_bytes_per_second': copied,
      'share': moved / (figures['ms_per_token'] / 1e3) / copied,
    }
    del cache
    gc.collect()
  return results


def slots(context: int) -> int:
  from bench import generation

  return context + generation.SLOTS


def cache_bytes(figures: dict, context: int) -> float:
  """Of the slots that hold tokens at the start: those that decoding must read."""
  return figures['cache_bytes'] * context / slots(context)


def copy_rate() -> float:
  """Bytes a second of a copy on the device, read and written ones both counted."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones(COPY_BYTES // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(x).block_until_ready()
  best = float('inf')
  for _ in range(10):
    began = time.perf_counter()
    copy(x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * x.nbytes / best


def fastest(settings: dict) -> str:
  return min(settings, key=lambda name: settings[name]['ms'])


def main() -> None:
  args = harness.arguments(
    {'ours': ours, 'peer': peer, 'decoding': decoding},
    variants='mha,gqa,mqa,mla',
    batch=16,
    decode_batch=32,
    contexts='1024,8192',
    compiled=1,
    blockwise=0,
  )
  name = harness.gpu()
  chip = targets.chip(name)
  peak = chip and chip.flops
  rows = []
  for variant in args.variants.split(','):
    case = {
      'variant': variant,
      'batch': args.batch,
      'decode_batch': args.decode_batch,
      'contexts': [int(context) for context in args.contexts.split(',')],
      'compiled': args.compiled,
      'blockwise': args.blockwise,
    }
    mine = harness.run_worker('bench.gpu', 'ours', case)
    other = harness.run_worker('bench.gpu', 'peer', case)
    losses = [of['loss'] for of in (*mine.values(), *other.values())]
    if max(losses) - min(losses) > 0.02:
      raise AssertionError(f'{variant}: ours and peer are not the same model: losses {losses}')
    if peak:
      for setting in mine.values():
        setting['mfu'] = setting['model_flops'] / (setting['ms'] / 1e3) / peak
    best = {'ours': fastest(mine), 'peer': fastest(other)}
    rows.append({
      'variant': variant,
      'what': f'training step, batch {args.batch}, bfloat16, {name}',
      'unit': 'ms',
      **harness.one_ratio(
        mine[best['ours']]['ms'],
        other[best['peer']]['ms'],
        best['peer'],
        other[best['peer']]['ms'] / mine[best['ours']]['ms'],
      ),
      'ours_setting': best['ours'],
      'mfu': mine[best['ours']].get('mfu'),
      'all_settings': {'ours': mine, 'peer': other},
    })  # fmt: skip
    for context, figures in harness.run_worker('bench.gpu', 'decoding', case).items():
      rows.append({
        'variant': variant,
        'what': f'decode, batch {args.decode_batch}, context {context}, bfloat16, {name}',
        'unit': 'ms/token',
        **harness.one_ratio(
          figures['ms'],
          figures['ms'] * figures['share'],
          'a copy of as many bytes',
          figures['share'],
        ),
        **figures,
      })  # fmt: skip
    harness.write(rows, args.json)  # what is measured is kept, should the next variant fail
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
