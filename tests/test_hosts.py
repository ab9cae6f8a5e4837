"""A run over several processes is the run of one: the same losses, the same files, resumed too."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import SHORT_RUN, tiny_config

from mla import metrics

LIMIT = 200  # seconds

# What a launcher such as Ray's JaxTrainer does in each process; then the trainer, as everywhere.
HOST = """
import json, sys
from pathlib import Path
import jax
from ml_collections import ConfigDict
config, workdir, address, count, index = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4 // int(count))
jax.distributed.initialize(address, int(count), int(index))
from mla.train import train_and_evaluate
assert jax.device_count() == 4
assert train_and_evaluate(ConfigDict(json.loads(config)), Path(workdir))
"""


def start(config, workdir: Path, count: int) -> list[subprocess.Popen]:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  flags = [config.to_json(), str(workdir), address, str(count)]
  return [
    subprocess.Popen(
      [sys.executable, '-c', HOST, *flags, str(index)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def finish(hosts: list[subprocess.Popen]) -> list[str]:
  """What each printed; all must have ended well."""
  try:
    printed = [host.communicate(timeout=LIMIT) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  errors = '\n'.join(error for _, error in printed)[-3000:]
  assert [host.returncode for host in hosts] == [0] * len(hosts), errors
  return [out for out, _ in printed]


def config_of(text: Path, **changes):
  changes = {'batch_size': 4, 'mesh.data': 2, 'mesh.fsdp': 2, **changes}
  config = tiny_config('mla')
  config.update_from_flattened_dict({**SHORT_RUN, 'data.files': str(text), **changes})
  return config


def losses(workdir: Path) -> list[float]:
  """Each step's, then the last evaluation's (a kill may cost an earlier one)."""
  lines = metrics.read(workdir / 'metrics.jsonl')
  assert lines[-1]['step'] == SHORT_RUN['num_steps']
  return [line['loss'] for line in lines if 'loss' in line] + [lines[-1]['eval_loss']]


def test_two_hosts_train_as_one_and_go_on_when_killed(text, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(start(config_of(text), one, 1))
  hosts = start(config_of(text), two, 2)
  while not (two / 'checkpoints' / '2').exists():
    assert all(host.poll() is None for host in hosts)
    time.sleep(0.01)
  for host in hosts:
    host.kill()
    host.communicate()
  first, second = finish(start(config_of(text), two, 2))
  assert 'from step' in first and 'step 12' in first and 'step' not in second
  np.testing.assert_allclose(losses(two), losses(one), atol=1e-5)
