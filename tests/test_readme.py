"""The README's commands run, in its order, on a small model; its links and figures are there."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```sh\n(.*?)```', README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace('\\\n', ' ').splitlines()]
# What makes a run short; what the README's command sets itself comes after and wins.
SMALL = {
  'num_layers': 1,
  'd_model': 16,
  'ffn_dim': 16,
  'seq_len': 32,
  'num_steps': 4,
  'warmup_steps': 2,
  'eval_every': 4,
  'data.eval_tokens': 512,
}


def test_the_readmes_commands_run(tmp_path):
  """On a copy of the checkout's code, so that runs/ and results/ here are left alone."""
  for name in ('train.py', 'eval.py', 'generate.py', 'sweep.py', 'configs', 'mla'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / 'results').mkdir()
  text = tmp_path / 'text.txt'
  text.write_text('we the people of the laboratory\n' * 500)
  ran = 0
  for command in COMMANDS:
    words = shlex.split(command, comments=True)
    if words == ['make', 'train']:  # less its installation
      recipe = re.search(r'\$\(BIN\)/(python train.py \S+)', (ROOT / 'Makefile').read_text())
      words = shlex.split(recipe[1])
    if words[:1] != ['python']:
      continue
    if words[1] in ('train.py', 'sweep.py'):
      small = {**SMALL, 'data.files': text}
      words[3:3] = [f'--config.{name}={value}' for name, value in small.items()]
    done = subprocess.run(
      [sys.executable, *words[1:]],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    assert done.returncode == 0, (command, done.stderr)
    ran += 1
  assert ran >= 5
  runs = json.loads((tmp_path / 'results' / 'small.json').read_text())['runs']
  assert len(runs) == 4
  assert (tmp_path / 'results' / 'small.png').stat().st_size > 1000


@pytest.mark.parametrize('target', re.findall(r'^make (\S+)', '\n'.join(COMMANDS), re.M))
def test_make_knows_its_targets(target):
  done = subprocess.run(
    ['make', '--dry-run', target], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
  for link in re.findall(r'\]\(([^)]+)\)', README):
    if not link.startswith('https://'):
      assert (ROOT / link).exists(), link


def test_the_fields_named_exist():
  from configs import base
  from mla.config import field

  named = set(re.findall(r'--config\.([a-z_.]+)', README))
  assert len(named) > 8
  for name in named:
    field(base.get_config(), name)


def test_what_is_said_of_the_table_is_so():
  """The difference that is named, and each config's figures beside it."""
  results = ROOT / 'results' / 'small.json'
  runs = {Path(run['workdir']).name: run for run in json.loads(results.read_text())['runs']}
  more = math.log(runs['mla_small']['perplexity'] / runs['mha_small']['perplexity'])
  assert f'MLA lies {more:.3f} nats above MHA' in README
  intervals = [runs[name]['perplexity_ci95'] for name in ('mla_small', 'mqa_small')]
  assert max(low for low, _ in intervals) < min(high for _, high in intervals)  # not told apart
  for name, run in runs.items():
    text = (ROOT / 'configs' / f'{name}.py').read_text()
    assert f'{run["bits_per_byte"]:.3f} bits per byte ({run["perplexity"]:.3f} perplexity)' in text


def test_the_table_is_that_of_the_results():
  """Every row of the README's table is what mla.tables makes of results/small.json."""
  from mla import tables

  runs = json.loads((ROOT / 'results' / 'small.json').read_text())['runs']
  assert tables.compare(runs) in README
