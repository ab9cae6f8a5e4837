"""A user's mistakes: exit code 2, one line that names field and cure, no traceback, no harm."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config

import configs.mla_small
from mla.train import train_and_evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def runner():
  """command(argv) -> {"code", "out", "err"}, by tests/forked.py."""
  with subprocess.Popen(
    [sys.executable, str(ROOT / 'tests' / 'forked.py')],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  ) as process:

    def command(argv: list[str]) -> dict:
      process.stdin.write(json.dumps({'argv': argv}) + '\n')
      process.stdin.flush()
      return json.loads(process.stdout.readline())

    yield command
    process.stdin.close()


@pytest.fixture(scope='module')
def places(tmp_path_factory) -> dict[str, Path]:
  """What the commands below point at."""
  root = tmp_path_factory.mktemp('places')
  text = root / 'text.txt'
  text.write_text('the quick brown fox jumps over the lazy dog\n' * 400)
  (root / 'short.txt').write_text('too short for any window\n' * 40)
  (root / 'empty.txt').write_text('')
  (root / 'binary.txt').write_bytes(bytes(range(256)))
  (root / 'prose.py').write_text('this is not Python')
  (root / 'bare.py').write_text('x = 1')
  (root / 'foreign').mkdir()
  (root / 'foreign' / 'thesis.tex').write_text('ten years of work')
  (root / 'broken_config').mkdir()
  (root / 'broken_config' / 'config.json').write_text('{"attention": ')
  (root / 'list_config').mkdir()
  (root / 'list_config' / 'config.json').write_text('[1, 2]')
  (root / 'poor_config').mkdir()
  (root / 'poor_config' / 'config.json').write_text('{"attention": "mla"}')
  config = tiny_config('mla', data__files=str(text), num_steps=1, warmup_steps=0, num_layers=1)
  config.batch_size = configs.mla_small.get_config().batch_size  # d_model is to differ first
  train_and_evaluate(config, root / 'run')
  shutil.copytree(root / 'run', root / 'torn')
  for path in (root / 'torn' / 'checkpoints').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  shutil.copytree(root / 'run', root / 'untrained')
  shutil.rmtree(root / 'untrained' / 'checkpoints')
  return {path.stem: path for path in root.iterdir()}


# After `train.py --config=configs/mla_small.py --workdir=(a new one)`: the flags, and what the one
# line must say. {name} is one of `places`.
TRAIN = [
  ('--config.latent_dims=8', 'config.latent_dims: .*did you mean latent_dim'),
  ('--config.data.tokeniser=bytes', 'data.tokeniser: .*did you mean data.tokenizer'),
  ('--config.zzzz=8', 'config.zzzz: .*configs/base.py'),
  ('--config.latent_dim=many', 'latent_dim'),
  ('--config.latent_dim=0', 'latent_dim=0'),
  ('--config.latent_dim=-4', 'latent_dim=-4'),
  ('--config.latent_dim=99999999999', 'latent_dim=99999999999'),
  ('--config.rope_dim=0', 'rope_dim=0'),
  ('--config.rope_dim=7', 'rope_dim=7.*even'),
  ('--config.attention=lstm', 'attention=lstm: choose one of mha'),
  ('--config.attention=gqa --config.num_kv_heads=0', 'num_kv_heads=0'),
  ('--config.attention=gqa --config.num_kv_heads=3', 'num_kv_heads=3: .*divides num_heads=4'),
  ('--config.attention=mha --config.rope_dim=64', 'rope_dim=64: .*head_dim=32'),
  ('--config.attention=mha --config.rope_dim=0 --config.head_dim=7', 'head_dim=7.*even'),
  ('--config.num_heads=0', 'num_heads=0'),
  ('--config.d_model=-1', 'd_model=-1'),
  ('--config.num_layers=0', 'num_layers=0'),
  ('--config.seq_len=0', 'seq_len=0'),
  ('--config.dtype=float16', 'dtype=float16: choose one of float32'),
  ('--config.remat=some', 'remat=some: choose one of none'),
  ('--config.learning_rate=0', 'learning_rate=0'),
  ('--config.learning_rate=nan', 'learning_rate=nan'),
  ('--config.grad_clip=0', 'grad_clip=0'),
  ('--config.weight_decay=-1', 'weight_decay=-1'),
  ('--config.rope_base=1', 'rope_base=1'),
  ('--config.batch_size=0', 'batch_size=0'),
  ('--config.batch_size=15 --config.mesh.fsdp=2', 'mesh'),
  ('--config.batch_size=1000000', 'batch_size=1000000'),
  ('--config.accumulation_steps=0', 'accumulation_steps=0'),
  ('--config.accumulation_steps=3', 'accumulation_steps=3: must divide batch_size=8'),
  ('--config.num_steps=0', 'num_steps=0'),
  ('--config.num_steps=10 --config.warmup_steps=10', 'warmup_steps=10: must be below num_steps=10'),
  ('--config.seed=-1', 'seed=-1'),
  ('--config.log_every=0', 'log_every=0'),
  ('--config.checkpoints_kept=0', 'checkpoints_kept=0'),
  ('--config.param_budget=1000', 'param_budget=1000'),
  ('--config.mesh.data=0', 'mesh.data=0'),
  ('--config.mesh.data=-1 --config.mesh.fsdp=-1', 'mesh.fsdp=-1'),
  ('--config.mesh.tensor=1000', 'mesh: .*1000'),
  ('--config.data.dataset=nothing_like_it', 'data.dataset=nothing_like_it: .*tfds build'),
  ('--config.data.dataset=../../etc', 'data.dataset=../../etc: not a dataset name'),
  ('--config.data.text_key=poem', 'data.text_key=poem: .*text'),
  ('--config.data.validation_split=dev', "data.validation_split: .*'dev'.*validation"),
  ('--config.data.files=/nowhere/*.txt', 'data.files=/nowhere'),
  ('--config.data.files={binary}', 'data.files: .*binary.txt holds a NUL byte'),
  ('--config.data.files={empty}', 'data.files'),
  ('--config.data.files={short}', 'batch_size=8: .*windows'),
  ('--config.data.files={text} --config.data.validation_files=/nowhere', 'data.validation_files'),
  ('--config.data.tokenizer=words', 'data.tokenizer=words: choose bytes'),
  ('--config.data.files={text} --config.data.tokenizer=bpe:50000', 'data.tokenizer=bpe:50000'),
  ('--config.data.data_dir=/proc/nowhere', 'data.data_dir=/proc/nowhere'),
  ('--workdir=/proc/nowhere', '--workdir=/proc/nowhere'),
  ('--workdir={text}', '--workdir=.*text.txt'),
  ('--workdir={foreign}', '--workdir=.*foreign: is not empty'),
  ('--workdir={broken_config}', 'broken_config/config.json: is not whole JSON'),
  ('--workdir={list_config}', 'list_config/config.json: cannot be read'),
  ('--workdir={run}', 'd_model=128: .* holds a run with d_model=32;'),
  ('--config=configs/nothing.py', 'configs/nothing.py'),
  ('--config={prose}', 'prose.py'),
  ('--config={bare}', 'bare.py'),
  ('--confg=3', 'confg'),
  ('latent_dim=8', 'latent_dim=8: not a flag'),
]

EVAL = [
  ('', '--workdir: which run'),
  ('--workdir=/nowhere', '--workdir=/nowhere: no run there'),
  ('--workdir={foreign}', 'foreign: no run there'),
  ('--workdir={broken_config}', 'broken_config/config.json: is not whole JSON'),
  ('--workdir={poor_config}', 'poor_config.*lacks this field'),
  ('--workdir={untrained}', 'untrained: the run has no checkpoint yet'),
  ('--workdir={torn}', 'torn/checkpoints/1: cannot be read'),
  ('--workdir={run} --cache_dtype=int4', '--cache_dtype=int4: choose one of float32'),
  ('--workdir={run} --json=/nowhere/a.json', '--json=/nowhere/a.json'),
  ('--workdir={run} --plot=/nowhere/a.png', '--plot=/nowhere/a.png'),
  ('--workdir={run} --plot=a.txt', '--plot=a.txt: the name must end in .png'),
  ('--workdir={run} --json={foreign}', '--json=.*foreign'),
  ('{run}', 'not a flag'),
]


def contents(places: dict[str, Path]) -> dict[Path, bytes]:
  files = (f for place in places.values() for f in (place, *place.rglob('*')) if f.is_file())
  return {path: path.read_bytes() for path in files}


def check(answer: dict, named: str) -> None:
  assert answer['code'] == 2, answer
  assert answer['err'].startswith('error: ') and answer['err'].count('\n') == 1, answer['err']
  assert 'Traceback' not in answer['out'] + answer['err']
  assert re.search(named, answer['err']), answer['err']


@pytest.mark.parametrize(('flags', 'named'), TRAIN, ids=[flags for flags, _ in TRAIN])
def test_train(runner, places, tmp_path, flags, named):
  before = contents(places)
  new = tmp_path / 'new'
  argv = ['train.py', '--config=configs/mla_small.py', f'--workdir={new}']
  check(runner([*argv, *flags.format(**places).split()]), named)
  assert contents(places) == before
  assert not new.exists()


def test_train_without_a_config(runner):
  check(runner(['train.py']), '--config: which')


@pytest.mark.parametrize(('flags', 'named'), EVAL, ids=[flags for flags, _ in EVAL])
def test_eval(runner, places, flags, named):
  before = contents(places)
  check(runner(['eval.py', *flags.format(**places).split()]), named)
  assert contents(places) == before
