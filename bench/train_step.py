"""Training step: tokens/s of ours and of transformers on torch, same shape, dtype and weights.

python -m bench.train_step [--rounds=3] [--variants=mha,mla] [--batch=16] [--json=FILE]

One step is forward, gradient, clipping and AdamW on a batch of small-config windows. The losses
of both sides' first steps must agree to 1e-4, or nothing is reported. Compilation is reported
apart. torch is run with sdpa, eager and compiled (sdpa under torch.compile, where there is a C++
compiler), each with and without keeping freed memory as ours does (mla/backends/cpu/host.py); its
best counts.
"""

import functools
import importlib
import shutil
import time

import numpy as np

from bench import harness

SECONDS, WARM_UP = 8.0, 30  # timed for so long, after so many steps: the heap has stopped growing


def case_config(case: dict):
  config = importlib.import_module(f'configs.{case["variant"]}_small').get_config()
  config.batch_size = case['batch']
  return config


def batch_of(case: dict, config) -> np.ndarray:
  shape = (case['batch'], config.seq_len + 1)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


def ours(case: dict) -> dict:
  import jax
  from flax import nnx

  from mla import backends, model, sharding
  from mla import step as step_lib
  from mla.optimizer import make_optimizer

  config = case_config(case)
  backends.prepare(case['batch'])
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    create = functools.partial(step_lib.init_state, config, 257, optimizer)
    placement = sharding.shardings(jax.eval_shape(create), mesh)
    state = jax.jit(create, out_shardings=placement)()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model.make_model(config, 257)))
    step = functools.partial(step_lib.train_step, config, graphdef, optimizer)
    tokens = sharding.put_batch(batch_of(case, config), mesh)
    began = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    compiled = jitted.lower(state, tokens).compile()
    compiling = time.perf_counter() - began
    losses = []

    def once():
      nonlocal state
      state, measured = compiled(state, tokens)
      losses.append(measured['loss'])

    rate = measure(once, lambda: float(losses[-1]), tokens.shape[0] * config.seq_len)
  figures = {'tokens_per_second': rate, 'compile_seconds': compiling, 'loss': float(losses[0])}
  return {'jit': figures}


def peer(case: dict) -> dict:
  import torch

  from bench.peers import make_peer
  from mla.backends.cpu import host
  from mla.model import make_model

  config = case_config(case)
  torch.set_num_threads(harness.cores())
  tokens = torch.tensor(batch_of(case, config), dtype=torch.long)
  ours = make_model(config, 257)
  results = {}
  losses: list[torch.Tensor]
  for memory in ('usual memory', 'kept memory'):
    if memory == 'kept memory':
      host.keep_freed_memory()
    for setting in ('sdpa', 'eager', 'compiled') if shutil.which('c++') else ('sdpa', 'eager'):
      model = make_peer(config, ours, 'eager' if setting == 'eager' else 'sdpa')
      optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
      )
      losses = []

      def loss_of(tokens, model=model):
        logits = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

      if setting == 'compiled':
        loss_of = torch.compile(loss_of)

      def once(model=model, optimizer=optimizer, losses=losses, loss_of=loss_of):
        loss = loss_of(tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        losses.append(loss.detach())

      began = time.perf_counter()
      once()
      first = time.perf_counter() - began
      rate = measure(once, lambda: None, tokens.shape[0] * config.seq_len)
      results[f'{setting}, {memory}'] = {
        'tokens_per_second': rate,
        'first_step_seconds': first,
        'loss': float(losses[0]),
      }
  return results


def measure(once, wait, tokens: int) -> float:
  """Tokens a second of a step in the steady state; `wait` returns when the last one is done."""
  for _ in range(WARM_UP):
    once()
  wait()
  began, steps = time.perf_counter(), 0
  while time.perf_counter() - began < SECONDS:
    for _ in range(5):
      once()
    wait()
    steps += 5
  return steps * tokens / (time.perf_counter() - began)


def main() -> None:
  args = harness.arguments({'ours': ours, 'peer': peer}, rounds=3, variants='mha,mla', batch=16)
  rows = []
  for variant in args.variants.split(','):
    case = {'variant': variant, 'batch': args.batch}
    row = harness.side_by_side('bench.train_step', case, args.rounds, 'tokens_per_second')
    settings = row['all_settings']
    losses = [figures['loss'] for side in settings.values() for figures in side.values()]
    if max(losses) - min(losses) > 1e-4:
      raise AssertionError(f'{variant}: ours and peer are not the same model: losses {losses}')
    what = f'training step, batch {args.batch} x 256, float32'
    rows.append({'variant': variant, 'what': what, 'unit': 'tokens/s', **row})
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
