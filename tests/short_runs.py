"""Runs of a few steps, as tests of training make them."""

import subprocess
import sys
from pathlib import Path

from conftest import SHORT_RUN, tiny_config

from mla import metrics

ROOT = Path(__file__).parent.parent
FIELDS = {
  **SHORT_RUN,
  'log_every': 1,
  'eval_every': 6,
  'checkpoint_every': 3,
}


def config_of(text: Path, **changes):
  config = tiny_config('mla')
  config.update_from_flattened_dict({**FIELDS, 'data.files': str(text)})
  config.update(changes)
  return config


def command(text: Path, workdir: Path, **changes) -> list[str]:
  arm = {'latent_dim': 8, 'rope_dim': 4, 'num_heads': 2, 'head_dim': 6, 'batch_size': 8}
  fields = {**FIELDS, **arm, 'data.files': text, **changes}
  return [
    *(sys.executable, str(ROOT / 'train.py'), f'--config={ROOT}/configs/mla_small.py'),
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]


def run(*args) -> subprocess.CompletedProcess:
  return subprocess.run(command(*args), capture_output=True, text=True, timeout=300)


def figures(workdir: Path) -> list[dict]:
  """Every line of metrics.jsonl, less what the clock decides."""
  lines = metrics.read(workdir / 'metrics.jsonl')
  return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]
