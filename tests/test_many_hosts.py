"""Two and four processes, joined as train.py joins them, on meshes of every kind across them.

`make test-hosts`: minutes, so not a part of `make test`, which has tests/test_hosts.py.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_hosts import config_of, finish, losses

from mla import evaluate
from mla.checkpoint import Checkpoints
from mla.train import train_and_evaluate

MESHES = [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)]  # over four devices
ROOT = Path(__file__).parent.parent
LIMIT = 900  # seconds: one start trains on all of them

# Trains one run after the other. The last process stops a run called `stopped` after step 6; in one
# called `waits-I` process I waits there, and the other ones for it.
HOST = """
import json, signal, sys, time
from pathlib import Path
import jax
from ml_collections import ConfigDict
runs, address, count, index = json.loads(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4 // count)
from mla import hosts
hosts.join(address, index, count)
from mla.train import train_and_evaluate
for workdir, config in runs.items():
  def report(step, evaluation):
    if step == 6 and 'stopped' in workdir and index == count - 1:
      signal.raise_signal(signal.SIGTERM)
    if step == 6 and workdir.endswith(f'waits-{index}'):
      time.sleep(600)
  ending = train_and_evaluate(ConfigDict(config), Path(workdir), report=report)
  print(Path(workdir).name, ending.name)
"""


def start(runs: dict, count: int) -> list[subprocess.Popen]:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  what = json.dumps({str(workdir): config.to_dict() for workdir, config in runs.items()})
  return [
    subprocess.Popen(
      [sys.executable, '-c', HOST, what, address, str(count), str(index)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def run_of(text: Path, mesh: tuple[int, int, int], **changes):
  # More evaluation windows than a batch, and not a multiple of it.
  names = zip(('mesh.data', 'mesh.fsdp', 'mesh.tensor'), mesh, strict=True)
  return config_of(text, **{'data.eval_tokens': 16 * 19, **dict(names), **changes})


@pytest.fixture(scope='module')
def alone(text, tmp_path_factory) -> list[float]:
  """The losses of one process."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  assert train_and_evaluate(run_of(text, (8, 1, 1)), workdir)
  return losses(workdir)


@pytest.fixture(scope='module')
def saved(text, tmp_path_factory) -> Path:
  """Runs of two processes: one to the end on each mesh, and one stopped on its way."""
  folder = tmp_path_factory.mktemp('two')
  runs = {folder / name_of(mesh): run_of(text, mesh) for mesh in MESHES}
  printed = finish(start({**runs, folder / 'stopped': run_of(text, (1, 1, 4))}, 2), LIMIT)
  assert all(out.splitlines()[-1] == 'stopped SIGTERM' for out in printed)
  return folder


def name_of(mesh: tuple[int, int, int]) -> str:
  return '-'.join(map(str, mesh))


@pytest.mark.parametrize('mesh', MESHES)
def test_two_processes_train_as_one(saved, alone, mesh):
  np.testing.assert_allclose(losses(saved / name_of(mesh)), alone, atol=1e-5)


def test_what_two_saved_one_and_four_go_on_with(saved, alone, text, tmp_path):
  """On other meshes; and four train as one does on every mesh."""
  assert Checkpoints(saved / 'stopped').steps()[-1] == 7  # the step they agreed on
  four, one = tmp_path / 'four', tmp_path / 'one'
  for workdir in (four, one):
    shutil.copytree(saved / 'stopped', workdir)
  assert train_and_evaluate(run_of(text, (2, 4, 1)), one)
  fresh = {tmp_path / name_of(mesh): run_of(text, mesh) for mesh in MESHES}
  finish(start({four: run_of(text, (2, 1, 2)), **fresh}, 4), LIMIT)
  for workdir in (one, four, *fresh):
    np.testing.assert_allclose(losses(workdir), alone, atol=1e-5)
    assert not (workdir / 'checkpoints-damaged').exists()


def test_processes_that_read_different_texts_are_told_so(text, tmp_path):
  hosts = []
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  config = run_of(Path('text.txt'), (2, 1, 2)).to_dict()
  for index in range(2):
    place = tmp_path / str(index)
    place.mkdir()
    (place / 'text.txt').write_text(text.read_text().replace('wall', ('wall', 'fence')[index]))
    what = json.dumps({str(tmp_path / 'run'): config})
    hosts.append(
      subprocess.Popen(
        [sys.executable, '-c', HOST, what, address, '2', str(index)],
        cwd=place,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  for host in hosts:
    _, error = host.communicate(timeout=LIMIT)
    assert (
      host.returncode and 'UserError: data.*: text and tokenizer: process 1 of the run' in error
    )
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('packing', ['', 'documents'])
def test_two_processes_read_a_run_as_one(text, saved, tmp_path, packing):
  """Through caches of two dtypes: the figures of one process, written and printed by the first."""
  workdir = saved / name_of(MESHES[0])
  if packing:
    workdir = tmp_path / 'packed'
    assert train_and_evaluate(run_of(text, (8, 1, 1), **{'data.packing': packing}), workdir)
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  flags = [f'--workdir={workdir}', '--cache_dtype=float32,int8', '--max_tokens=900']
  flags += ['--multihost', f'--coordinator={address}', '--num_processes=2']
  printed = finish(
    [
      subprocess.Popen(
        [sys.executable, 'eval.py', *flags, f'--process_id={i}', f'--json={tmp_path}/{i}.json'],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(2)
    ],
    LIMIT,
  )
  assert 'perplexity' in printed[0] and 'packed' not in printed[1] and '4-1-1' not in printed[1]
  assert not (tmp_path / '1.json').exists()
  together = json.loads((tmp_path / '0.json').read_text())['runs']
  alone = evaluate.evaluate_caches(workdir, ['float32', 'int8'], max_tokens=900)
  for one, other in zip(together, alone, strict=True):
    assert one.keys() == other.keys()
    for name in ('perplexity', 'bits_per_byte', 'kv_cache_bytes_per_token'):
      assert one[name] == pytest.approx(other[name], rel=1e-5)
    np.testing.assert_allclose(one['perplexity_ci95'], other['perplexity_ci95'], rtol=1e-5)
    assert one['tokens_evaluated'] == other['tokens_evaluated']
    seen = ([part['loss'] for part in its['loss_by_position']] for its in (one, other))
    np.testing.assert_allclose(*seen, atol=1e-5)


@pytest.mark.parametrize('victim', [0, 1])
def test_where_one_is_killed_the_other_says_so_and_the_rerun_goes_on(text, alone, tmp_path, victim):
  config, cut = run_of(text, (1, 1, 4)), tmp_path / f'waits-{victim}'
  both = start({cut: config}, 2)
  while Checkpoints(cut).steps()[-1:] != [4]:
    assert all(host.poll() is None for host in both)
    time.sleep(0.1)
  time.sleep(2)  # the other one is at step 6 now, or soon
  both[victim].kill()
  began = time.monotonic()
  _, error = both[1 - victim].communicate(timeout=60)
  assert time.monotonic() - began < 60 and both[1 - victim].returncode != 0
  assert 'start all of them again' in error
  both[victim].communicate()
  again = cut.rename(tmp_path / 'again')
  first, _ = finish(start({again: config}, 2))
  assert 'from step' in first and 'damaged' not in first
  np.testing.assert_allclose(losses(again), alone, atol=1e-5)
