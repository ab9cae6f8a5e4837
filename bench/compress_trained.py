"""Learned or compressed afterwards? Small models on the embedded corpus, loss against cache bytes.

python -m bench.compress_trained --workdir=runs/compress_trained [--seeds=0,1,2]
                                 [--folder=results/compress]

By each seed: mha_small as results/frontier trained it (800 steps, STEPS); the same model compressed
by each method to each of SIZES, which stand against the frontier's MLA of the same bytes, learned
from scratch; and `whitened` healed, trained on with 5 and 20 % of the tokens (HEALED steps), as is
the source itself, so that what healing brings can be told from what more training does. `rotary`
rows have every rank, by R.

Run again, it does what is missing; every measurement is a line of FOLDER/small.jsonl, read through
a bfloat16 cache on the frontier's text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla.sweep import statistics as stats

STEPS = 800
HEALED = (40, 160)
SIZES = (8, 16, 32, 64)
ROPES = (32, 16, 8)
RATE = 1e-3  # of healing, its peak: a third of training's; none other was tried
WARMUP = 0.1  # of the steps of healing
CACHE_DTYPE = 'bfloat16'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--folder', default='results/compress')
  parser.add_argument('--frontier', default='results/frontier')
  parser.add_argument('--seeds', default='0,1,2')
  args = parser.parse_args()
  folder = Path(args.folder)
  folder.mkdir(parents=True, exist_ok=True)
  lines = Lines(folder / 'small.jsonl')
  for seed in map(int, args.seeds.split(',')):
    measure(Path(args.workdir) / f'seed{seed}', seed, lines)
  summary = summarise(lines.lines, Path(args.frontier) / 'results.jsonl')
  (folder / 'small.json').write_text(json.dumps(summary, indent=1) + '\n')


class Lines:
  """The measurements on disk, found by what they are of."""

  KEYS = ('seed', 'what', 'method', 'latent_dim', 'rope_dim', 'steps')

  def __init__(self, path: Path):
    self._path = path
    text = path.read_text() if path.exists() else ''
    self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

  def find(self, **what) -> dict[str, Any] | None:
    wanted = {key: what.get(key) for key in self.KEYS}
    return next((n for n in self.lines if {k: n.get(k) for k in self.KEYS} == wanted), None)

  def add(self, **line) -> None:
    self.lines.append(line)
    with self._path.open('a') as out:
      out.write(json.dumps(line) + '\n')
    print(json.dumps(line), flush=True)


def measure(workdir: Path, seed: int, lines: Lines) -> None:
  from configs import mha_small
  from mla.convert import compress
  from mla.train import train_and_evaluate

  config = mha_small.get_config()
  config.update({'num_steps': STEPS, 'warmup_steps': 150, 'eval_every': STEPS, 'seed': seed})
  source = workdir / 'mha'
  train_and_evaluate(config, source)
  if not lines.find(seed=seed, what='source'):
    lines.add(seed=seed, what='source', **score(source))
  one_shot(source, seed, lines)
  for steps in HEALED:
    for size in SIZES:
      small = workdir / f'whitened-c{size}'
      if not small.exists():
        compress.compress(source, small, latent_dim=size)
      what = {'what': 'healed', 'method': 'whitened', 'latent_dim': size, 'rope_dim': 32}
      heal({**what, 'seed': seed, 'steps': steps}, small, lines)
    heal({'what': 'source trained on', 'seed': seed, 'steps': steps}, source, lines)


def one_shot(source: Path, seed: int, lines: Lines) -> None:
  """The compressed models, with nothing trained."""
  missing = [what for what in wanted_one_shot(seed) if not lines.find(**what)]
  if not missing:
    return
  from mla import generate
  from mla.convert import compress
  from mla.data.pipeline import eval_windows, load_run_data

  run = generate.load(source)
  data = load_run_data(source, run.config)
  windows = eval_windows(
    data.validation, seq_len=run.config.seq_len, max_tokens=run.config.data.eval_tokens
  )
  calibration = eval_windows(
    data.train, seq_len=run.config.seq_len, max_tokens=compress.CALIBRATION
  ).without_padding()
  observed = compress.observe(run.model, calibration.tokens[:, :-1], calibration.starts)
  for what in missing:
    latent = what.get('latent_dim') or compress.full_rank(run.config, what['rope_dim'])
    method = what.get('method', 'svd')
    _, model = compress.convert(run.config, run.model, observed, latent, what['rope_dim'], method)
    lines.add(**what, **read(model, windows))


def wanted_one_shot(seed: int) -> Iterator[dict[str, Any]]:
  from mla.convert import compress

  for size in SIZES:
    for method in compress.METHODS:
      yield {
        'seed': seed, 'what': 'one-shot', 'method': method, 'latent_dim': size, 'rope_dim': 32,
      }  # fmt: skip
  for rope in ROPES:
    yield {'seed': seed, 'what': 'rotary', 'rope_dim': rope}


def read(model, windows) -> dict[str, Any]:
  """Loss and bytes of a model's cache."""
  from mla import evaluate, sharding

  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  found = evaluate.read_through_cache(model, windows, CACHE_DTYPE, mesh)
  loss = float(found.by_window.sum() / windows.mask.sum())
  return {'loss': loss, 'bytes_per_token': found.bytes_per_token}


def score(workdir: Path) -> dict[str, Any]:
  """The same of a run."""
  from mla import evaluate
  from mla.workdir import read_config

  tokens = read_config(workdir).data.eval_tokens
  figures, nll = evaluate.score_run(workdir, CACHE_DTYPE, max_tokens=tokens)
  return {
    'loss': float(nll.sum()) / figures['tokens_evaluated'],
    'bytes_per_token': figures['kv_cache_bytes_per_token'],
  }


def heal(what: dict[str, Any], source: Path, lines: Lines) -> None:
  """Runs that begin with source's weights, on windows in another order, and what came of them."""
  from mla.train import train_and_evaluate
  from mla.workdir import read_config

  if lines.find(**what):
    return
  steps = what['steps']
  config = read_config(source)
  config.update(
    {
      'num_steps': steps,
      'warmup_steps': int(WARMUP * steps),
      'learning_rate': RATE,
      'eval_every': steps,
      'seed': 1000 + what['seed'],  # else it would see the source's first windows again
    }
  )
  workdir = source.parent / f'{source.name}-healed{steps}'
  train_and_evaluate(config, workdir, init_from=source)
  lines.add(**what, **score(workdir))


def summarise(lines: list[dict[str, Any]], frontier: Path) -> dict[str, Any]:
  """Means over seeds with their 95 %, by way and bytes; and differences.

  Compressed models are compared within a seed, for they come of one source; with learned ones as
  independent samples, as the frontier's arms are.
  """
  seeds = sorted({line['seed'] for line in lines if line['what'] == 'source'})
  learned = [json.loads(text) for text in frontier.read_text().splitlines()]
  # Seed 0 chose the frontier's learning rates and does not judge.
  learned = [n for n in learned if n['status'] == 'done' and n['seed'] > 0]
  of_way: dict[str, list[dict[str, Any]]] = {'learned from scratch': []}
  for size in SIZES:
    group = [line for line in learned if line['arm'] == f'mla-c{size}']
    of_way['learned from scratch'].append(
      point(
        {line['seed']: line['loss'] for line in group},
        group[0]['kv_cache_bytes_per_token'],
        latent_dim=size,
      )
    )
  for line in lines:
    if line['what'] in ('one-shot', 'healed'):
      healed = f'healed, {100 * line["steps"] / STEPS:.0f} %' if 'steps' in line else ''
      points = of_way.setdefault(healed or line['method'], [])
      if not any(n['latent_dim'] == line['latent_dim'] for n in points):
        group = [n for n in lines if same(n, line)]
        losses = {n['seed']: n['loss'] for n in group}
        points.append(point(losses, line['bytes_per_token'], latent_dim=line['latent_dim']))
  source = point(losses_of(lines, 'source'), 2048.0)
  others: dict[str, Any] = {}
  for line in lines:
    if line['what'] in ('rotary', 'source trained on'):
      which = line.get('steps') or line['rope_dim']
      group = [n for n in lines if same(n, line)]
      losses = {n['seed']: n['loss'] for n in group}
      others.setdefault(line['what'], {})[str(which)] = point(losses, line['bytes_per_token'])
  frontiers = {n['seed']: n['loss'] for n in learned if n['arm'] == 'mha'}
  return {
    'seeds': seeds,
    'cache_dtype': CACHE_DTYPE,
    'source': source,
    'frontier_source': point(frontiers, 2048.0),
    'lines': of_way,
    **others,
    'whitened_minus_svd': paired(of_way, 'whitened', 'svd'),
    'two_sided_minus_whitened': paired(of_way, 'two_sided', 'whitened'),
    'healed_minus_learned': {
      way: {
        str(p['latent_dim']): apart(p, q)
        for p in by_size(of_way[way])
        for q in of_way['learned from scratch']
        if p['latent_dim'] == q['latent_dim']
      }
      for way in of_way
      if way.startswith('healed')
    },
  }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
  """Of one thing, but for the seed."""
  return all(a.get(key) == b.get(key) for key in Lines.KEYS if key != 'seed')


def losses_of(lines: list[dict[str, Any]], what: str) -> dict[int, float]:
  return {line['seed']: line['loss'] for line in lines if line['what'] == what}


def by_size(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
  return sorted(points, key=lambda n: n['latent_dim'])


def point(losses: dict[int, float], size: float, **more) -> dict[str, Any]:
  """One size of one way: the mean over seeds, and the half-width of its 95 %."""
  found = stats.estimate(list(losses.values()))
  half = found.half_width()
  return {
    **more,
    'bytes_per_token': size,
    'loss': found.mean,
    'half_width': stats.finite(half),
    'losses': {str(seed): loss for seed, loss in sorted(losses.items())},
  }


def interval(found: stats.Estimate) -> dict[str, Any]:
  half = found.half_width()
  return {'mean': found.mean, 'half_width': stats.finite(half)}


def paired(of_way: dict[str, list], one: str, other: str) -> dict[str, Any]:
  """Differences within a seed, by latent_dim."""
  found = {}
  for a, b in zip(by_size(of_way[one]), by_size(of_way[other]), strict=True):
    both = sorted(a['losses'].keys() & b['losses'].keys())
    differences = [a['losses'][seed] - b['losses'][seed] for seed in both]
    found[str(a['latent_dim'])] = interval(stats.estimate(differences))
  return found


def apart(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
  """The difference of two independent samples of seeds."""
  one, other = (stats.estimate(list(n['losses'].values())) for n in (a, b))
  return interval(stats.difference(one, other))


if __name__ == '__main__':
  main()
