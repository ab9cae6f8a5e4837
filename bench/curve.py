"""Seconds from nothing to the curve: loss by width, of one nested run and of a run a width.

python -m bench.curve --folder=FOLDER --json=FILE

The commands that a user gives, one after the other, each compiling anew; the runs lie in FOLDER,
which must be empty. 800 steps each, so that the nested run's losses are behind (docs/log.md).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import harness
from mla import files

WIDTHS = ('8', '16', '32', '64')
SCHEDULE = ('--config.num_steps=800', '--config.warmup_steps=150', '--config.eval_every=800')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True)
  parser.add_argument('--json', required=True)
  args = parser.parse_args()
  folder = Path(args.folder)
  if folder.exists() and any(folder.iterdir()):
    raise SystemExit(f'{folder}: is not empty, and runs that are there would not be trained again')
  command('prepare.py', '--config=configs/mla_small.py')  # the corpus is made once, for all
  widest = WIDTHS[-1]
  found: dict[str, Any] = {
    'nested': {
      'training': train(folder / 'nested', widest, f'--config.nested={",".join(WIDTHS)}'),
      'evaluation': evaluate(folder / 'nested'),
    },
    'separate': {
      'training': sum(train(folder / f'c{width}', width) for width in WIDTHS),
      'evaluation': evaluate(*(folder / f'c{width}' for width in WIDTHS)),
    },
  }
  nested, separate = (sum(found[side].values()) for side in ('nested', 'separate'))
  found |= {'ratio': nested / separate, 'unit': 's'}
  print(json.dumps(found), flush=True)
  about = {'hardware': harness.hardware(), 'versions': harness.versions()}
  files.write_json(Path(args.json), {**about, 'wall': found})


def train(workdir: Path, latent_dim: str, *more: str) -> float:
  fields = ('--config=configs/mla_small.py', f'--config.latent_dim={latent_dim}', *SCHEDULE, *more)
  return command('train.py', *fields, f'--workdir={workdir}')


def evaluate(*workdirs: Path) -> float:
  return command('eval.py', *(f'--workdir={workdir}' for workdir in workdirs))


def command(*words: str) -> float:
  """Its seconds, with nothing compiled before."""
  with tempfile.TemporaryDirectory() as cache:
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    return time.perf_counter() - began


if __name__ == '__main__':
  main()
