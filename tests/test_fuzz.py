"""Hostile input and damage by the hundred, from one seed: `make test-fuzz`, not in `make test`.

Whatever is done to a run, a sweep, a text or a flag, the command ends with exit code 0, 1 or 2 and
at most one line of error, in bounded time and memory; nothing that is not its own changes on disk;
and where it ends with 0, its figures are those of the healthy run.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHORT_RUN, tiny_config

ROOT = Path(__file__).parent.parent
SEED = 20261125
LIMIT_BYTES = 3 * 2**30  # of a command's memory; tests/forked.py limits its time

FIELDS = {
  **SHORT_RUN,
  'num_heads': 2,
  'head_dim': 6,
  'rope_dim': 4,
  'latent_dim': 8,
  'batch_size': 2,
  'num_steps': 2,
  'warmup_steps': 1,
  'log_every': 1,
  'eval_every': 2,
  'checkpoint_every': 1,
}


class Places:
  """A text, a finished run and a finished sweep; a case copies what it spoils."""

  def __init__(self, root: Path):
    self.text = root / 'text.txt'
    self.text.write_text(''.join(f'{n} bottles of beer on the wall\n' for n in range(300)))
    self.run, self.sweep = root / 'run', root / 'sweep'


@pytest.fixture(scope='module')
def places(tmp_path_factory, runner) -> Places:
  found = Places(tmp_path_factory.mktemp('places'))
  for command in (
    [*train_command(found), f'--workdir={found.run}'],
    [*sweep_command(found), f'--workdir={found.sweep}'],
  ):
    answer = runner(command)
    assert answer['code'] == 0, answer
  return found


@pytest.fixture(scope='module')
def runner():
  """command(argv) -> {"code", "out", "err", "rss"}, by tests/forked.py."""
  with subprocess.Popen(
    [sys.executable, str(ROOT / 'tests' / 'forked.py')],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  ) as process:
    assert process.stdin is not None and process.stdout is not None

    def command(argv: list[str]) -> dict:
      process.stdin.write(json.dumps({'argv': argv}) + '\n')
      process.stdin.flush()
      return json.loads(process.stdout.readline())

    yield command
    process.stdin.close()


def train_command(places: Places, **changes) -> list[str]:
  fields = {**FIELDS, 'data.files': places.text, **changes}
  return [
    *('train.py', '--config=configs/mla_small.py'),
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]


def sweep_command(places: Places) -> list[str]:
  return ['sweep.py', *train_command(places)[1:], '--sweep=latent_dim=4,8']


def check(answer: dict) -> None:
  told = answer['err'].splitlines()
  assert answer['code'] in (0, 1, 2), answer
  assert 'Traceback' not in answer['out'] + answer['err'], answer
  errors = [line for line in told if not line.startswith('warning: ')]
  assert len(errors) == (answer['code'] != 0), answer
  assert all(line.startswith('error: ') for line in errors), answer
  assert answer['rss'] < LIMIT_BYTES, answer


def contents(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and not path.is_symlink()
  }


# What can happen to a file. Each gets the file, a random number generator and a folder that is
# nobody's business, in which nothing may change.


def flip_a_bit(path: Path, rng: random.Random, elsewhere: Path) -> None:
  raw = bytearray(path.read_bytes())
  if raw:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
  path.write_bytes(raw)


def cut_short(path: Path, rng: random.Random, elsewhere: Path) -> None:
  os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def empty(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.write_bytes(b'')


def fill_with_noise(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))


def overwrite_some(path: Path, rng: random.Random, elsewhere: Path) -> None:
  raw = bytearray(path.read_bytes())
  start = rng.randrange(max(1, len(raw)))
  raw[start : start + 16] = rng.randbytes(16)
  path.write_bytes(raw)


def remove(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.unlink()


def put_a_folder(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.unlink()
  path.mkdir()
  (path / 'file').write_text('not what was expected')


def put_a_link(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.unlink()
  path.symlink_to(elsewhere / 'thesis.tex')


def put_a_dangling_link(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.unlink()
  path.symlink_to(elsewhere / 'nothing')


def put_a_pipe(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.unlink()
  os.mkfifo(path)


def nest_without_end(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.write_text(rng.choice(['[', '{"a":']) * 50_000)


def put_other_json(path: Path, rng: random.Random, elsewhere: Path) -> None:
  path.write_text(rng.choice(['null', '3', '"x"', '[]', '{}', '[{}]', 'NaN', '{"step": null}\n']))


DAMAGES: tuple[Callable[[Path, random.Random, Path], None], ...] = (
  *(flip_a_bit,) * 4,  # what shows least
  cut_short,
  empty,
  fill_with_noise,
  overwrite_some,
  remove,
  put_a_folder,
  put_a_link,
  put_a_dangling_link,
  put_a_pipe,
  nest_without_end,
  put_other_json,
)


@pytest.fixture
def elsewhere(tmp_path):
  """A folder that no command names; checked afterwards."""
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  (folder / 'thesis.tex').write_text('ten years of work')
  yield folder
  assert contents(folder) == {'thesis.tex': b'ten years of work'}


def spoil(folder: Path, rng: random.Random, elsewhere: Path, among: Callable[[Path], bool]) -> str:
  files = [path for path in sorted(folder.rglob('*')) if path.is_file() and among(path)]
  if rng.random() < 0.5:  # half of the time one that holds more than a name or a number
    files = [path for path in files if path.stat().st_size > 300]
  path, damage = rng.choice(files), rng.choice(DAMAGES)
  damage(path, rng, elsewhere)
  return f'{damage.__name__} {path.relative_to(folder)}'


def result_of(run: Path) -> dict[int, dict]:
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  return {line['step']: line for line in lines if 'eval_loss' in line}


@pytest.mark.parametrize('case', range(50))
def test_a_damaged_run_is_evaluated_rightly_or_not(case, places, runner, elsewhere, tmp_path):
  rng = random.Random(f'{SEED} eval {case}')
  run, figures = tmp_path / 'run', tmp_path / 'figures.json'
  shutil.copytree(places.run, run)
  done = spoil(run, rng, elsewhere, lambda path: 'tensorboard' not in path.parts)
  answer = runner(['eval.py', f'--workdir={run}', f'--json={figures}'])
  check(answer)
  if answer['code'] == 0:
    healthy = json.loads(healthy_figures(places, runner))
    found = json.loads(figures.read_text())['runs'][0]
    assert found['perplexity'] == healthy['perplexity'], done
    assert found['kv_cache_bytes_per_token'] == healthy['kv_cache_bytes_per_token'], done


def healthy_figures(places: Places, runner) -> str:
  path = places.run.parent / 'healthy.json'
  if not path.exists():
    answer = runner(['eval.py', f'--workdir={places.run}', f'--json={path}'])
    assert answer['code'] == 0, answer
  return json.dumps(json.loads(path.read_text())['runs'][0])


@pytest.mark.parametrize('case', range(50))
def test_a_damaged_run_goes_on_rightly_or_not(case, places, runner, elsewhere, tmp_path):
  rng = random.Random(f'{SEED} train {case}')
  run = tmp_path / 'run'
  shutil.copytree(places.run, run)
  shutil.rmtree(run / 'checkpoints' / '2')  # as if killed between the first save and the end
  done = spoil(run, rng, elsewhere, lambda path: True)
  before = contents(run / 'checkpoints') if (run / 'checkpoints').is_dir() else {}
  answer = runner([*train_command(places), f'--workdir={run}'])
  check(answer)
  if answer['code'] == 0:
    healthy, found = result_of(places.run), result_of(run)
    assert found[2]['eval_loss'] == healthy[2]['eval_loss'], done
  else:  # what was there is there still: in its place, or set aside
    after = {**contents(run)}
    for name, raw in before.items():
      assert raw in after.values(), (done, name)


@pytest.mark.parametrize('case', range(30))
def test_a_damaged_sweep_is_reported_rightly_or_not(case, places, runner, elsewhere, tmp_path):
  rng = random.Random(f'{SEED} sweep {case}')
  folder = tmp_path / 'sweep'
  shutil.copytree(places.sweep, folder)
  healthy = (folder / 'results.jsonl').read_bytes()
  done = spoil(folder, rng, elsewhere, lambda path: path.parent == folder or 'costs' in path.parts)
  answer = runner([*sweep_command(places), f'--workdir={folder}'])
  check(answer)
  if answer['code'] == 0:

    def losses(raw: bytes) -> dict[str, float]:
      lines = [json.loads(line) for line in raw.decode().splitlines()]
      return {line['trial']: line['loss'] for line in lines}

    assert losses((folder / 'results.jsonl').read_bytes()) == losses(healthy), done


NUMBERS = (
  '0 -1 1 2 3 7 0.5 1e3 100000 30000000 1e39 1e-46 nan inf -inf 2147483647 2147483648 '
  '99999999999999999999 True'
).split()
WORDS = [
  '',
  ' ',
  'None',
  'mla',
  'MHA',
  '\u00e9',
  'a b',
  "'",
  '"',
  '../..',
  '/',
  '{}',
  '%s',
  '\x1b[31m',
  'x' * 300,
]


@pytest.mark.parametrize('case', range(50))
def test_any_value_of_any_field_trains_or_is_refused(case, places, runner, tmp_path):
  rng = random.Random(f'{SEED} flags {case}')
  fields = flat(tiny_config('mla').to_dict())
  changes = {}
  for name in rng.sample(sorted(fields), rng.choice([1, 1, 2, 3])):
    changes[name] = rng.choice(WORDS if isinstance(fields[name], str) else NUMBERS)
  # What is right but too much work for a test.
  for name in ('num_steps', 'data.eval_tokens'):
    if changes.get(name, '0') in ('2147483647', '1e3'):
      del changes[name]
  command = [*train_command(places, **changes), f'--workdir={tmp_path / "run"}']
  answer = runner(command)
  check(answer)
  if answer['code'] == 0:
    assert math.isfinite(max(line['eval_loss'] for line in result_of(tmp_path / 'run').values()))


def flat(fields: dict, prefix: str = '') -> dict:
  found = {}
  for name, value in fields.items():
    found.update(flat(value, f'{name}.') if isinstance(value, dict) else {prefix + name: value})
  return found


TEXTS = (
  lambda rng: rng.randbytes(rng.choice([0, 1, 100, 5000])),
  lambda rng: b'\xef\xbb\xbf' + b'word ' * 2000,
  lambda rng: b'a line\r\n' * 1500,
  lambda rng: b'\0' * 6000,
  lambda rng: b'a title\n' + b'one long line ' * 800,
  lambda rng: '\u2581\U0001f600\u0000 '.encode() * 1500,
  lambda rng: ('\u00e9' * 4000).encode()[: rng.choice([7999, 8000])],
  lambda rng: b'\n' * 8000,
)
NAMES = (
  'plain.txt',
  'a[b].txt',
  'sp ace.txt',
  '\u6587' * 60 + '.txt',
  "quo'te.txt",
  '*.txt',
  '-x.txt',
)


@pytest.mark.parametrize('case', range(20))
def test_any_text_trains_or_is_refused(case, places, runner, elsewhere, tmp_path):
  rng = random.Random(f'{SEED} text {case}')
  path = tmp_path / rng.choice(NAMES)
  path.write_bytes(rng.choice(TEXTS)(rng))
  tokenizer = rng.choice(['bytes', 'bytes', 'bpe:300', 'bpe:257', 'bpe:0'])
  changes = {'data.files': path, 'data.tokenizer': tokenizer, 'data.data_dir': tmp_path / 'cache'}
  answer = runner([*train_command(places, **changes), f'--workdir={tmp_path / "run"}'])
  check(answer)
