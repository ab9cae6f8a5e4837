"""What nested latents are measured against, on the trials of a sweep; and what a step costs.

python -m bench.nested --workdir=SWEEP --json=FILE [--tokens=131072] [--rounds=5]

Of each trial with MLA a row a width, read through a bfloat16 cache, with the bytes of its arrays:
  as it lies    plain MLA, cut after training
  turned        the same, its latent turned first so that its principal axes come first
  uniform       nested MLA, one width in all layers
  by layer      nested MLA, each layer's width by a greedy search (mla/budgets.py)
Calibration is training text. A trial whose rows stand in the JSON already is passed by. At the end
a training step with and without nested latents, side by side in this process.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from mla import files
from mla.data.pipeline import EvalWindows

CALIBRATION = 16_384  # tokens
STEPS = 20  # a turn


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--json', required=True)
  parser.add_argument('--tokens', type=int, default=131_072)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  from mla import backends

  backends.prepare(32)
  path = Path(args.json)
  report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {'rows': []}
  report |= {'hardware': harness.hardware(), 'versions': harness.versions()}
  done = {row['trial'] for row in report['rows']}
  for workdir in sorted(Path(args.workdir, 'trials').iterdir()):
    if workdir.name in done:
      continue
    report['rows'] += cuts(workdir, args.tokens)
    files.write_json(path, report)
  if args.rounds:
    report['step'] = step_times(args.rounds)
    files.write_json(path, report)


def cuts(workdir: Path, tokens: int) -> list[dict[str, Any]]:
  """The rows of a trial; none of one that has no latent, or is not trained to its end."""
  from mla import evaluate, inside
  from mla.attention import nested
  from mla.checkpoint import Checkpoints
  from mla.data.pipeline import eval_windows
  from mla.workdir import read_config

  config = read_config(workdir)
  if config.attention != 'mla' or config.num_steps not in Checkpoints(workdir).steps():
    return []
  run = inside.open_run(workdir)
  windows = eval_windows(run.data.validation, seq_len=config.seq_len, max_tokens=tokens)
  calibration = eval_windows(run.data.train, seq_len=config.seq_len, max_tokens=CALIBRATION)
  calibration = calibration.without_padding()
  mesh = inside.sharding.make_mesh(inside.ONE_DEVICE)
  rows = []
  for method, widths, model, more in models(run, nested.widths_of(config), calibration):
    read = evaluate.read_through_cache(model, windows, 'bfloat16', mesh)
    row = {'trial': workdir.name, 'seed': config.seed, 'steps': config.num_steps, 'method': method}
    row |= {'widths': widths, 'bytes_per_token': read.bytes_per_token, **more}
    row['loss'] = float(read.by_window.sum() / windows.mask.sum())
    print(json.dumps(row), flush=True)
    rows.append(row)
  return rows


def models(run, widths: tuple[int, ...], calibration: EvalWindows) -> Iterator[tuple]:
  """(method, widths by layer, model, what else there is to say) of what a trial can become."""
  from mla import budgets, cutting

  config, layers = run.config, run.config.num_layers
  tokens, starts = calibration.tokens, calibration.starts
  if widths:
    for width in widths:
      yield 'uniform', [width] * layers, cutting.cut_latent(run.model, config, width)[0], {}
    for budget in budgets.search(run.model, config, tokens, starts):
      model = cutting.cut_layers(run.model, config, budget.widths)
      yield 'by layer', [*budget.widths], model, {'divergence': budget.divergence}
    return
  moments = cutting.latent_moments(run.model, tokens[:, :-1], starts)
  turned = cutting.rotate_latent(run.model, moments)
  of_turned = cutting.latent_moments(turned, tokens[:, :-1], starts)
  halves = [config.latent_dim >> times for times in range(4)]
  for width in (width for width in halves if width):
    cut = cutting.cut_plain(run.model, config, width, moments)
    yield 'as it lies', [width] * layers, cut, {}
    yield 'turned', [width] * layers, cutting.cut_plain(turned, config, width, of_turned), {}


def step_times(rounds: int) -> dict[str, Any]:
  """Milliseconds a training step of the small MLA with C = 64, nested and not, in turns."""
  import jax
  from flax import nnx

  from configs import mla_small
  from mla import model as model_lib
  from mla import sharding
  from mla.optimizer import make_optimizer
  from mla.step import init_state, jit_step

  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  batch = np.random.default_rng(0).integers(0, 257, (8, 257), dtype=np.int32)
  sides = {}
  with jax.set_mesh(mesh):
    for name, widths in (('plain', ''), ('nested', '8,16,32,64')):
      config = mla_small.get_config()
      config.latent_dim, config.nested = 64, widths
      optimizer = make_optimizer(config)
      graphdef = nnx.graphdef(nnx.eval_shape(lambda c=config: model_lib.make_model(c, 257)))

      def create(config=config, optimizer=optimizer):
        return init_state(config, 257, optimizer)

      placement = sharding.shardings(jax.eval_shape(create), mesh)
      state = jax.jit(create, out_shardings=placement)()
      tokens = sharding.put_batch(batch, mesh, 8)
      step = jit_step(config, graphdef, optimizer, placement).lower(state, tokens).compile()
      sides[name] = [step, state, tokens, []]
    for _ in range(rounds + 1):
      for side in sides.values():
        began = time.perf_counter()
        for _ in range(STEPS):
          side[1], measured = side[0](side[1], side[2])
        jax.block_until_ready((side[1], measured))
        side[3].append((time.perf_counter() - began) / STEPS * 1000)
  times = {name: side[3][1:] for name, side in sides.items()}  # the first turn warms up
  ratios = [n / p for n, p in zip(times['nested'], times['plain'], strict=True)]
  found: dict[str, Any] = {name: float(np.median(times[name])) for name in times}
  found |= {'ratio': float(np.median(ratios)), 'ratios': sorted(ratios), 'unit': 'ms'}
  print(json.dumps(found), flush=True)
  return found


if __name__ == '__main__':
  main()
