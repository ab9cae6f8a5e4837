"""A trained model compressed after the fact: perplexity against the bytes of its cache.

python -m bench.compress --workdir=W [--sizes=320,256,192,128] [--rope_dims=64] [--tokens=2048]
                         [--window=256] [--json=FILE] [--plot=FILE]

W is an MHA, GQA or MQA run, such as an imported one; nothing of it is changed. By each method and
size: perplexity of evenly spread windows of the validation text, read through a float32 cache, and
the bytes of those arrays; for the source and the whitened method through the other dtypes too.
`rotary only` has every rank, so what it loses is the rotary part's.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from bench import harness


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--sizes', default='320,256,192,128')
  parser.add_argument('--rope_dims', default='64')
  parser.add_argument('--tokens', type=int, default=2048)
  parser.add_argument('--window', type=int, default=256)
  parser.add_argument('--json')
  parser.add_argument('--plot')
  args = parser.parse_args()
  rows = list(measure(args))
  report = {'hardware': harness.hardware(), 'tokens': args.tokens, 'window': args.window}
  if args.json:
    Path(args.json).write_text(json.dumps({**report, 'rows': rows}, indent=2) + '\n')
  if args.plot:
    draw(rows, args.plot)


def measure(args):
  from mla import evaluate, generate, sharding
  from mla.cache import DTYPES
  from mla.convert import compress
  from mla.data.pipeline import eval_windows, load_data

  run = generate.load(Path(args.workdir))
  data = load_data(run.config)
  windows = eval_windows(data.validation, seq_len=args.window, max_tokens=args.tokens)
  calibration = eval_windows(data.train, seq_len=512, max_tokens=compress.CALIBRATION)
  observed = compress.observe(run.model, calibration.tokens[:, :-1])
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})

  def read(model, method: str, latent: int | None, rope: int | None, dtypes):
    for dtype in dtypes:
      found = evaluate.read_through_cache(model, windows, dtype, mesh)
      loss = found.by_window.sum() / windows.mask.sum()
      row = {'method': method, 'latent_dim': latent, 'rope_dim': rope, 'cache_dtype': dtype}
      row |= {'bytes_per_token': found.bytes_per_token, 'loss': float(loss)}
      row['perplexity'] = math.exp(loss)
      print(json.dumps(row), flush=True)
      yield row

  yield from read(run.model, 'source', None, None, DTYPES)
  for rope in map(int, args.rope_dims.split(',')):
    full = compress.full_rank(run.config, rope)
    whole = compress.convert(run.config, run.model, observed, full, rope, 'svd')[1]
    yield from read(whole, 'rotary only', full, rope, DTYPES[:1])
    for size in map(int, args.sizes.split(',')):
      for method in compress.METHODS:
        model = compress.convert(run.config, run.model, observed, size, rope, method)[1]
        yield from read(model, method, size, rope, DTYPES if method == 'whitened' else DTYPES[:1])


def draw(rows: list[dict], path: str) -> None:
  """Bytes in float32 against perplexity, a line a method and R."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.subplots()
  lines: dict[tuple, list] = {}
  for row in rows:
    if row['cache_dtype'] == 'float32' and row['method'] != 'source':
      point = (row['bytes_per_token'], row['perplexity'])
      lines.setdefault((row['method'], row['rope_dim']), []).append(point)
  several = len({rope for _, rope in lines}) > 1
  for (method, rope), points in lines.items():
    label = f'{method}, R = {rope}' if several else method
    axes.plot(*np.array(sorted(points)).T, marker='o', label=label)
  source = next(r for r in rows if r['method'] == 'source' and r['cache_dtype'] == 'float32')
  axes.plot(source['bytes_per_token'], source['perplexity'], 'k*', markersize=12, label='source')
  axes.set(xlabel='cache bytes a token, float32', ylabel='perplexity', yscale='log')
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  main()
