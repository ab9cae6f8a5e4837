"""A B A B: each side in a process of its own, in turns, on the same cores; then a table and JSON.

A worker is a module run as `python -m MODULE --worker=SIDE:JSON`, which prints as its last line a
JSON object {setting: {figure: value}}; a side's best setting of each round is what counts.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mla import files, paths
from mla.errors import UserError

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers')


def cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def hardware() -> dict:
  model = platform.processor()
  if Path('/proc/cpuinfo').exists():
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    model = next((x.split(':')[1].strip() for x in lines if x.startswith('model name')), model)
  found = {'cpu': model, 'cores': cores(), 'system': platform.system()}
  return {**found, 'gpu': gpu()} if gpu() else found


@functools.cache
def gpu() -> str:
  """The first NVIDIA card's name; '' without one."""
  if not shutil.which('nvidia-smi'):
    return ''
  query = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
  return (subprocess.run(query, capture_output=True, text=True).stdout.splitlines() or [''])[0]


def versions() -> dict[str, str]:
  installed = {d.metadata['Name'].lower(): d.version for d in metadata.distributions()}
  found = {name: installed[name] for name in PACKAGES if name in installed}
  return {'python': platform.python_version(), **found}


def arguments(sides: Mapping[str, Callable[[dict], dict]], **defaults) -> argparse.Namespace:
  """A bench's flags, --json among them. In a worker's process: does that side's work, and exits."""
  parser = argparse.ArgumentParser()
  for name, default in defaults.items():
    parser.add_argument(f'--{name}', type=type(default), default=default)
  parser.add_argument('--json')
  parser.add_argument('--worker')
  args = parser.parse_args()
  if args.worker:
    side, case = args.worker.split(':', 1)
    print(json.dumps(sides[side](json.loads(case))))
    sys.exit()
  try:
    paths.output('json', args.json, 'rows')
  except UserError as error:
    parser.error(str(error))
  return args


def run_worker(module: str, side: str, case: dict) -> dict[str, dict[str, float]]:
  """One process of one side; RuntimeError with its stderr if it fails."""
  done = subprocess.run(
    [sys.executable, '-m', module, f'--worker={side}:{json.dumps(case)}'],
    capture_output=True,
    text=True,
    env={**os.environ, 'OMP_NUM_THREADS': str(cores()), 'HF_HUB_OFFLINE': '1'},
  )
  if done.returncode:
    raise RuntimeError(f'{module} {side} {case} failed:\n{done.stderr[-3000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def side_by_side(
  module: str, case: dict, rounds: int, figure: str, better: Callable = max
) -> dict[str, Any]:
  """ours and peer in turns, `rounds` times; medians, and the ratio's median, least and largest."""
  rates: dict[str, list[float]] = {'ours': [], 'peer': []}
  winners: dict[str, str] = {}
  settings: dict[str, dict] = {}
  for _ in range(rounds):
    for side in rates:
      settings[side] = run_worker(module, side, case)
      best = better(settings[side], key=lambda name, s=side: settings[s][name][figure])
      rates[side].append(settings[side][best][figure])
      winners[side] = best
  ratios = [
    ours / peer if better is max else peer / ours
    for ours, peer in zip(rates['ours'], rates['peer'], strict=True)
  ]
  return {
    'ours': statistics.median(rates['ours']),
    'peer': statistics.median(rates['peer']),
    'ratio': statistics.median(ratios),
    'ratio_min': min(ratios),
    'ratio_max': max(ratios),
    'ours_setting': winners['ours'],
    'peer_setting': winners['peer'],
    'all_settings': settings,
  }


def one_ratio(ours: float, peer: float, peer_setting: str, ratio: float) -> dict[str, Any]:
  """The row of figures that were taken once, as side_by_side gives them for many rounds."""
  ratios = {name: ratio for name in ('ratio', 'ratio_min', 'ratio_max')}
  return {'ours': ours, 'peer': peer, 'peer_setting': peer_setting, **ratios}


def table(rows: list[dict]) -> str:
  heads = ('variant', 'what', 'ours', 'peer', 'unit', 'ratio', '(min to max)', 'peer setting')
  lines = [heads]
  for row in rows:
    lines.append((
      row['variant'],
      row['what'],
      f'{row["ours"]:,.1f}',
      f'{row["peer"]:,.1f}',
      row['unit'],
      f'{row["ratio"]:.2f}',
      f'({row["ratio_min"]:.2f} to {row["ratio_max"]:.2f})',
      row['peer_setting'],
    ))  # fmt: skip
  widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )


def report(rows: list[dict], path: str | None) -> None:
  """Prints the table; writes the JSON where a path is given."""
  print(table(rows))
  write(rows, path)


def write(rows: list[dict], path: str | None) -> None:
  """The JSON, where a path is given."""
  if path:
    content = {'hardware': hardware(), 'versions': versions(), 'rows': rows}
    files.write_whole(Path(path), json.dumps(content, indent=2) + '\n')
