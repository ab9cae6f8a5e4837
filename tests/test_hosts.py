"""A run over several processes is the run of one: the same losses, the same files, resumed too."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import SHORT_RUN, tiny_config

from mla import metrics
from mla.checkpoint import Checkpoints
from mla.train import train_and_evaluate

LIMIT = 200  # seconds

# What a launcher such as Ray's JaxTrainer does in each process; then the trainer, as everywhere.
HOST = """
import json, signal, sys, time
from pathlib import Path
import jax
from ml_collections import ConfigDict
config, workdir, stop_at, address, count, index = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4 // int(count))
jax.distributed.initialize(address, int(count), int(index))
from mla.train import train_and_evaluate
assert jax.device_count() == 4
def report(step, evaluation):
  if step == 6 and stop_at == '0':
    time.sleep(600)  # to be killed
  if step == int(stop_at) and index == '1':  # somebody stops one of the hosts
    signal.raise_signal(signal.SIGINT)
ending = train_and_evaluate(ConfigDict(json.loads(config)), Path(workdir), report=report)
print('ended by', ending.name)
"""


def start(config, workdir: Path, count: int, stop_at: int = -1) -> list[subprocess.Popen]:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  flags = [config.to_json(), str(workdir), str(stop_at), address, str(count)]
  return [
    subprocess.Popen(
      [sys.executable, '-c', HOST, *flags, str(index)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def finish(hosts: list[subprocess.Popen], limit: int = LIMIT) -> list[str]:
  """What each printed; all must have ended well."""
  try:
    printed = [host.communicate(timeout=limit) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  errors = '\n'.join(error for _, error in printed)[-3000:]
  assert [host.returncode for host in hosts] == [0] * len(hosts), errors
  return [out for out, _ in printed]


def config_of(text: Path, **changes):
  # Few evaluations, for each samples a text, and along tensor every token is many small exchanges.
  changes = {'batch_size': 8, 'eval_every': 6, 'mesh.data': 2, 'mesh.fsdp': 2, **changes}
  config = tiny_config('mla')
  config.update_from_flattened_dict({**SHORT_RUN, 'data.files': str(text), **changes})
  return config


def losses(workdir: Path) -> list[float]:
  """Each step's, then the last evaluation's (a kill may cost an earlier one)."""
  lines = metrics.read(workdir / 'metrics.jsonl')
  assert lines[-1]['step'] == SHORT_RUN['num_steps']
  return [line['loss'] for line in lines if 'loss' in line] + [lines[-1]['eval_loss']]


def test_two_hosts_train_as_one_and_go_on_whatever_happens(text, tmp_path):
  """Killed; then with a damaged checkpoint; then stopped on one of them; then on one host only."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  (alone,) = finish(start(config_of(text), one, 1))
  assert 'ended by COMPLETE' in alone
  hosts = start(config_of(text), two, 2, stop_at=0)
  while not (two / 'checkpoints' / '4').exists():
    assert all(host.poll() is None for host in hosts)
    time.sleep(0.01)
  for host in hosts:
    host.kill()
    host.communicate()
  assert Checkpoints(two).steps() == [2, 4]
  for path in (two / 'checkpoints' / '4' / 'params').rglob('*'):
    if path.is_file() and path.stat().st_size > 100:
      os.truncate(path, path.stat().st_size // 2)
  # On a mesh on which both hold every row.
  shared = config_of(text, **{'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.tensor': 4})
  first, second = finish(start(shared, two, 2, stop_at=6))
  assert 'from step 2' in first and 'step' not in second
  assert 'stopped by Ctrl-C at step 7, saved' in first
  assert 'ended by CTRL_C' in first and 'ended by CTRL_C' in second
  assert os.listdir(two / 'checkpoints-damaged') == ['4']  # by one of them, and by no other
  assert Checkpoints(two).steps() == [4, 6, 7]
  assert train_and_evaluate(config_of(text, **{'mesh.fsdp': 4}), two)
  np.testing.assert_allclose(losses(two), losses(one), atol=1e-5)
