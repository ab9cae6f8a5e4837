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
from mla.config import ADDED, SCHEMA_VERSION
from mla.train import train_and_evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def runner():
  """command(argv, env) -> {"code", "out", "err", "rss"}, by tests/forked.py."""
  with subprocess.Popen(
    [sys.executable, str(ROOT / 'tests' / 'forked.py')],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  ) as process:

    def command(argv: list[str], **env: str) -> dict:
      process.stdin.write(json.dumps({'argv': argv, 'env': env}) + '\n')
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
  (root / 'leaving.py').write_text('raise SystemExit(0)')
  (root / 'number.py').write_text('def get_config():\n  return 3\n')
  (root / 'asking.py').write_text('def get_config(size):\n  return {}\n')
  (root / 'no_arms.py').write_text('def get_arms():\n  return {}\n')
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
  for name, spoil in CONFIGS.items():
    (root / name).mkdir()
    fields = json.loads((root / 'run' / 'config.json').read_text())
    (root / name / 'config.json').write_text(json.dumps(spoil(fields)))
  (root / 'config_folder' / 'config.json').mkdir(parents=True)
  (root / 'config_pipe').mkdir()
  os.mkfifo(root / 'config_pipe' / 'config.json')
  (root / 'dangling').symlink_to(root / 'nothing')
  (root / 'other.json').write_text('{"thesis": "ten years of work"}')
  (root / 'other.png').write_text('no picture')
  (root / 'linked.json').symlink_to(root / 'text.txt')
  shutil.copytree(root / 'run', root / 'untrained')
  shutil.rmtree(root / 'untrained' / 'checkpoints')
  return {'root': root, **{path.stem: path for path in root.iterdir()}}


# A run's config.json, and what became of it.
CONFIGS = {
  'null_group': lambda fields: {**fields, 'mesh': None},
  'scalar_group': lambda fields: {**fields, 'data': 3},
  'true_layers': lambda fields: {**fields, 'num_layers': True},
  'wordy_heads': lambda fields: {**fields, 'num_heads': 'four'},
  'unknown_field': lambda fields: {**fields, 'num_haeds': 4},
  'later_schema': lambda fields: {**fields, 'schema_version': 999},
  'odd_schema': lambda fields: {**fields, 'schema_version': 'x'},
  'no_object': lambda fields: [fields],
}

# After `train.py --config=configs/mla_small.py --workdir=(a new one)`: the flags, and what the one
# line must say. {name} is one of `places`.
TRAIN = [
  ('--config.latent_dims=8', 'config.latent_dims: .*did you mean latent_dim'),
  ('--config.data.tokeniser=bytes', 'data.tokeniser: .*did you mean data.tokenizer'),
  ('--config.zzzz=8', 'config.zzzz: .*configs/base.py'),
  ('--config.latent_dim=many', 'latent_dim=many: must be a whole number'),
  ('--config.learning_rate=fast', 'learning_rate=fast: must be a number'),
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
  ('--process_id=1', '--process_id: goes with --multihost'),
  ('--multihost --num_processes=2', '--multihost: .*give each --coordinator=HOST:PORT'),
  ('--multihost --coordinator=host', '--coordinator=host: write HOST:PORT'),
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
  # Dry runs.
  ('--target=v5e:2x4', '--target: goes with --dry_run'),
  ('--dry_run --target=v9:2x4', '--target=v9:2x4: no such target; .*v5e:2x4'),
  ('--dry_run --json={run}/config.json', 'is a name of the run'),
  ('--dry_run --config.data.tokenizer=words', 'data.tokenizer=words: choose bytes'),
  # Sizes that can't be.
  ('--config.ffn_dim=2147483647', 'ffn_dim=2147483647: .*GiB.*lower ffn_dim'),
  ('--config.d_model=100000 --config.ffn_dim=100000', 'GiB.*lower (d_model|ffn_dim)'),
  ('--config.num_layers=100000 --config.ffn_dim=500000', 'GiB.*lower (num_layers|ffn_dim)'),
  ('--config.batch_size=2000000000', 'GiB.*lower batch_size'),
  ('--config.seq_len=2000000000', 'GiB.*lower seq_len'),
  ('--config.latent_dim=2000000000 --config.ffn_dim=8', 'GiB.*lower latent_dim'),
  ('--config.data.tokenizer=bpe:9999999 --config.d_model=20000 --config.ffn_dim=8', 'GiB.*lower'),
  ('--config.param_budget=100', 'raise param_budget to at least'),
  ('--config.learning_rate=1e39', 'learning_rate=1e\\+39: .*float32'),
  ('--config.learning_rate=1e-46', 'learning_rate=1e-46: .*float32'),
  ('--config.weight_decay=1e39', 'weight_decay=1e\\+39: .*float32'),
  ('--config.rope_base=1e39', 'rope_base=1e\\+39: .*float32'),
  ('--config.grad_clip=inf', 'grad_clip=inf: .*float32'),
  # A path as users write it.
  ('--workdir=gs://bucket/run', '--workdir=gs://bucket/run: .*gcsfuse'),
  ('--workdir=s3://bucket/run', '--workdir=s3://bucket/run: not a path'),
  ('--workdir={run}[1]', r'takes \[ in .* for a pattern'),
  ('--workdir={run}*', r'takes \* in .* for a pattern'),
  ('--workdir={run}/' + 'x' * 256, 'a name of 256 bytes'),
  ('--workdir={run}/' + '\u6587' * 100, 'a name of 300 bytes'),
  ('--workdir=', '--workdir: is empty'),
  ('--workdir=~nobody-of-that-name/x', 'no home folder'),
  ('--workdir={dangling}', 'dangling: is a link to what is not there'),
  ('--workdir={run}\x07', r'control character'),
  # Files that are read.
  ('--config={foreign}', '--config=.*foreign: is not a regular file'),
  ('--config={leaving}', 'leaving.py: no get_config.*SystemExit'),
  ('--config={number}', 'number.py: its get_config.. returns no ConfigDict'),
  ('--config={asking}', 'asking.py: no get_config'),
  ('--workdir={null_group}', 'null_group/config.json: mesh=None: must be a group'),
  ('--workdir={later_schema}', 'later_schema/config.json: schema_version=999: a later version'),
  # Flags.
  ('--flagfile=/nowhere', '--flagfile: cannot be read'),
  ('-config.latent_dims=8', 'latent_dims: .*did you mean latent_dim'),
  ('--config.attention=lstm --config.rope_dim=7', 'attention=lstm: choose one of'),
  ('--config.latent_dim=True', 'latent_dim'),
]

EVAL = [
  ('', '--workdir: which run'),
  ('--workdir=/nowhere', '--workdir=/nowhere: no run there'),
  ('--workdir={foreign}', 'foreign: no run there'),
  ('--workdir={broken_config}', 'broken_config/config.json: is not whole JSON'),
  ('--workdir={poor_config}', 'poor_config.*lacks this field'),
  ('--workdir={untrained}', 'untrained: the run has no checkpoint yet'),
  ('--workdir={torn}', 'torn/checkpoints/1: cannot be read'),
  ('--workdir={run} --max_tokens=0', '--max_tokens=0: must be'),
  ('--workdir={run} --cache_dtype=int4', '--cache_dtype=int4: choose one of float32'),
  ('--workdir={run} --json=/nowhere/a.json', '--json=/nowhere/a.json'),
  ('--workdir={run} --plot=/nowhere/a.png', '--plot=/nowhere/a.png'),
  ('--workdir={run} --plot=a.txt', '--plot=a.txt: the name must end in .png'),
  ('--workdir={run} --json={foreign}', '--json=.*foreign'),
  ('{run}', 'not a flag'),
  *((f'--workdir={{{name}}}', f'{name}/config.json: .*') for name in CONFIGS),
  ('--workdir={true_layers}', 'num_layers=True: must be an integer'),
  ('--workdir={unknown_field}', 'num_haeds: no such field; did you mean num_heads'),
  ('--workdir={config_folder}', 'config.json: is not a regular file'),
  ('--workdir={config_pipe}', 'config.json: is not a regular file'),
  ('--workdir=gs://bucket/run', 'gcsfuse'),
  ('--workdir={run} --json={run}/metrics.jsonl', '--json=.*is a name of the run or sweep'),
  ('--workdir={run} --json={run}/config.json', '--json=.*is a name of the run or sweep'),
  ('--workdir={run} --json={run}/checkpoints/x.json', '--json=.*is a name of the run or sweep'),
  ('--workdir={run} --plot={run}/tensorboard/x.png', '--plot=.*is a name of the run or sweep'),
  ('--workdir={run} --json={other}', '--json=.*no earlier result of this command'),
  ('--workdir={run} --json={linked}', '--json=.*linked.json: is a link'),
  ('--workdir={run} --plot={root}/other.png', '--plot=.*no .png picture'),
  ('--workdir={run} --json=a.png --plot=a.png', '--plot=a.png: is what --json names'),
  ('--workdir={run} --json=/dev/null', '--json=/dev/null: is not a regular file'),
]

GENERATE = [
  ('--prompt=a', '--workdir: which run'),
  ('--workdir={run}', '--prompt: continue what'),
  ('--workdir={run} --prompt=a --prompts={text}', '--prompt: continue what'),
  ('--workdir={run} --prompts={binary}', '--prompts=.*binary.txt: is not UTF-8'),
  ('--workdir={run} --prompts={empty}', '--prompts=.*empty.txt: holds no line'),
  ('--workdir={foreign} --prompt=a', 'foreign: no run there'),
  ('--workdir={untrained} --prompt=a', 'untrained: the run has no checkpoint yet'),
]

# After `sweep.py --config=configs/mla_small.py --workdir=(a new one) --sweep=seed=0,1`.
SWEEP = [
  ('--price=1', '--price: goes with --dry_run'),
  ('--dry_run --target=v9:2x4', '--target=v9:2x4: no such target'),
  ('--arms={foreign}', '--arms=.*foreign: is not a regular file'),
  ('--arms={leaving}', 'leaving.py: no get_arms'),
  ('--arms={no_arms}', 'no_arms.py: its get_arms.. names no arm'),
  ('--workdir=gs://bucket/sweep', 'gcsfuse'),
  ('--workdir={run}?', r'takes \? in .* for a pattern'),
  ('--workdir={text}', 'text.txt: is not a folder'),
  ('--config.ffn_dim=2147483647', 'trial seed=0: ffn_dim=2147483647: .*GiB'),
]


def contents(places: dict[str, Path]) -> dict[Path, bytes]:
  files = (f for f in places['root'].rglob('*') if f.is_file())
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
  check(runner(['train.py']), '--config: which\\? configs/ has .*mla_small.*e.g. --config=')


@pytest.mark.parametrize(('flags', 'named'), EVAL, ids=[flags for flags, _ in EVAL])
def test_eval(runner, places, flags, named):
  before = contents(places)
  check(runner(['eval.py', *flags.format(**places).split()]), named)
  assert contents(places) == before


@pytest.mark.parametrize(('flags', 'named'), GENERATE, ids=[flags for flags, _ in GENERATE])
def test_generate(runner, places, flags, named):
  before = contents(places)
  check(runner(['generate.py', *flags.format(**places).split()]), named)
  assert contents(places) == before


@pytest.mark.parametrize(('flags', 'named'), SWEEP, ids=[flags for flags, _ in SWEEP])
def test_sweep(runner, places, tmp_path, flags, named):
  before = contents(places)
  new = tmp_path / 'new'
  argv = ['sweep.py', '--config=configs/mla_small.py', f'--workdir={new}', '--sweep=seed=0,1']
  check(runner([*argv, *flags.format(**places).split()]), named)
  assert contents(places) == before
  assert not new.exists()


@pytest.mark.parametrize(
  ('entry', 'flag', 'named'),
  [
    ('train.py', '--workdirr=a', '--workdirr: no such flag; did you mean --workdir'),
    ('generate.py', '--cache_dtpye=int8', 'did you mean --cache_dtype'),
    ('eval.py', '--zzzz', '--zzzz: no such flag; --help shows'),
  ],
)
def test_an_unknown_flag_names_the_nearest(runner, entry, flag, named):
  check(runner([entry, flag]), named)


def test_a_field_before_its_config(runner):
  answer = runner(['train.py', '--config.latent_dim=8', '--config=configs/mla_small.py'])
  check(answer, 'comes before the config it sets')


def test_a_message_is_one_line_whatever_the_user_wrote(runner):
  answer = runner(
    ['train.py', '--config=configs/mla_small.py', '--config.remat=a\nb\x1b[31m' + 'x' * 9000]
  )
  check(answer, 'remat=')
  assert '\x1b' not in answer['err'] and len(answer['err']) < 2000


def small(places: dict[str, Path], workdir: Path, *flags: str) -> list[str]:
  """A training of one step."""
  fields = {'num_layers': 1, 'd_model': 16, 'ffn_dim': 16, 'seq_len': 16, 'num_steps': 1}
  fields |= {'warmup_steps': 0, 'data.eval_tokens': 64, 'data.files': places['text']}
  given = [f'--config.{name}={value}' for name, value in fields.items()]
  return ['train.py', '--config=configs/mla_small.py', f'--workdir={workdir}', *given, *flags]


@pytest.mark.parametrize(
  ('env', 'flags'),
  [
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, ['--config.mesh.tensor=2']),
    ({'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}, []),
    ({}, ['-config.latent_dim=8']),
  ],
  ids=['XLA_FLAGS', 'ascii', 'one dash'],
)
def test_what_a_user_may_set_works(runner, places, tmp_path, env, flags):
  answer = runner(small(places, tmp_path / 'a run \u00e9 of mine', *flags), **env)
  assert answer['code'] == 0, answer
  if 'XLA_FLAGS' in env:
    assert 'data=2 x fsdp=1 x tensor=2' in answer['out']


def test_a_dry_run_makes_its_json_and_no_run(runner, places, tmp_path):
  run, json_file = tmp_path / 'run', tmp_path / 'dry.json'
  for _ in range(2):  # an earlier one may be replaced
    answer = runner(small(places, run, '--dry_run', '--target=cpu', f'--json={json_file}'))
    assert answer['code'] == 0 and 'fits     yes' in answer['out'], answer
  report = json.loads(json_file.read_text())
  assert report['target'] == 'cpu' and report['fits'] and report['bound_by'] is None
  assert not run.exists()


def test_an_older_runs_config_has_the_fields_added_since(runner, places, tmp_path):
  run = tmp_path / 'run'
  assert runner(small(places, run))['code'] == 0
  fields = json.loads((run / 'config.json').read_text())
  assert fields.pop('schema_version') == SCHEMA_VERSION
  for name in ADDED:
    group, _, key = name.rpartition('.')
    del (fields[group] if group else fields)[key]
  (run / 'config.json').write_text(json.dumps(fields))
  again = runner(small(places, run))
  assert again['code'] == 0 and 'already trained' in again['out'], again


def test_a_reader_that_leaves_does_not_end_the_run(places, tmp_path):
  """`python train.py | head -1`: the checkpoint is there all the same."""
  run = tmp_path / 'run'
  command = [sys.executable, *small(places, run, '--config.num_steps=40', '--config.log_every=1')]
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  with subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert not process.stderr.read()
  assert process.returncode == 0
  assert (run / 'checkpoints' / '40').is_dir()
