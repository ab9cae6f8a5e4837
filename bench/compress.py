"""A trained model compressed after the fact: perplexity against the bytes of its cache.

python -m bench.compress --workdir=W [--sizes=320,256,192,128] [--rope_dims=64] [--tokens=2048]
                         [--window=256] [--trained=V,...] [--json=FILE] [--plot=FILE]

W is an MHA, GQA or MQA run, such as an imported one; nothing of it is changed. By each method and
size: perplexity of evenly spread windows of the validation text, read through a float32 cache, and
the bytes of those arrays; for the source and the whitened method through the other dtypes too.
`rotary only` has every rank, so what it loses is the rotary part's. V are runs of W's tokenizer,
such as compressed ones that were trained on, called by their folders' names; --rope_dims= reads
them alone. What FILE has already is not measured again.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--sizes', default='320,256,192,128')
  parser.add_argument('--rope_dims', default='64')
  parser.add_argument('--tokens', type=int, default=2048)
  parser.add_argument('--window', type=int, default=256)
  parser.add_argument('--trained', default='')
  parser.add_argument('--json')
  parser.add_argument('--plot')
  args = parser.parse_args()
  about = {'tokens': args.tokens, 'window': args.window}
  rows: list[dict] = []
  if args.json and Path(args.json).exists():
    found = json.loads(Path(args.json).read_text())
    if {key: found[key] for key in about} != about:
      raise SystemExit(f'{args.json}: holds other windows; give another file')
    rows = found['rows']
  for row in measure(args, rows):
    rows.append(row)
    print(json.dumps(row), flush=True)
    if args.json:
      report = {'hardware': harness.hardware(), **about, 'rows': rows}
      Path(args.json).write_text(json.dumps(report, indent=2) + '\n')
  if args.plot:
    draw(rows, args.plot)


def measure(args, known: list[dict]) -> Iterator[dict]:
  from mla import evaluate, generate, sharding
  from mla.cache import DTYPES
  from mla.convert import compress
  from mla.data.pipeline import eval_windows, load_data

  run = generate.load(Path(args.workdir))
  data = load_data(run.config)
  windows = eval_windows(data.validation, seq_len=args.window, max_tokens=args.tokens)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})

  @functools.cache
  def observed():
    calibration = eval_windows(data.train, seq_len=512, max_tokens=compress.CALIBRATION)
    calibration = calibration.without_padding()
    return compress.observe(run.model, calibration.tokens[:, :-1], calibration.starts)

  def read(make: Callable[[], Any], method: str, latent: int | None, rope: int | None, dtypes):
    what = {'method': method, 'latent_dim': latent, 'rope_dim': rope}
    missing = [
      dtype
      for dtype in dtypes
      if not any({**row, **what, 'cache_dtype': dtype} == row for row in known)
    ]
    model: Any = make() if missing else None
    for dtype in missing:
      found = evaluate.read_through_cache(model, windows, dtype, mesh)
      loss = float(found.by_window.sum() / windows.mask.sum())
      size = found.bytes_per_token
      yield {
        **what, 'cache_dtype': dtype, 'bytes_per_token': size, 'loss': loss,
        'perplexity': math.exp(loss),
      }  # fmt: skip

  def small(latent: int, rope: int, method: str) -> Any:
    return compress.convert(run.config, run.model, observed(), latent, rope, method)[1]

  yield from read(lambda: run.model, 'source', None, None, DTYPES)
  for workdir in filter(None, args.trained.split(',')):
    trained = generate.load(Path(workdir))
    latent, rope = trained.config.latent_dim or None, trained.config.rope_dim or None
    make = functools.partial(getattr, trained, 'model')
    yield from read(make, Path(workdir).name, latent, rope, DTYPES[:1])
  for rope in map(int, filter(None, args.rope_dims.split(','))):
    full = compress.full_rank(run.config, rope)
    make = functools.partial(small, full, rope, 'svd')
    yield from read(make, 'rotary only', full, rope, DTYPES[:1])
    for size in map(int, args.sizes.split(',')):
      for method in compress.METHODS:
        dtypes = DTYPES if method == 'whitened' else DTYPES[:1]
        make = functools.partial(small, size, rope, method)
        yield from read(make, method, size, rope, dtypes)


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
