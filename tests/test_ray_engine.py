"""The Ray engine gives the losses of the local one, even if a worker and a node die on the way."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import test_sweep

ray = pytest.importorskip('ray')
Cluster = pytest.importorskip('ray.cluster_utils').Cluster
jsonschema, psutil, yaml = map(pytest.importorskip, ('jsonschema', 'psutil', 'yaml'))  # Ray's

LIMIT = 240  # seconds that one sweep may take


def run(folder: Path, text: Path, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    test_sweep.command(folder, text, *test_sweep.AXES, *flags),
    capture_output=True,
    text=True,
    timeout=LIMIT,
  )


def test_both_engines_give_the_same_losses(text, tmp_path, monkeypatch):
  # A cluster that is gone, as one that was killed leaves behind: the sweep's own is not that one.
  monkeypatch.setenv('RAY_ADDRESS', '127.0.0.1:1')
  for engine in ('local', 'ray'):
    done = run(tmp_path / engine, text, f'--engine={engine}')
    assert done.returncode == 0, done.stderr
  assert len(test_sweep.losses(tmp_path / 'ray')) == 4
  assert test_sweep.losses(tmp_path / 'ray') == test_sweep.losses(tmp_path / 'local')


@pytest.fixture
def cluster():
  """Three raylets: a head that computes nothing, and two nodes with room for a trial each."""
  store = {'object_store_memory': 80 * 2**20}
  cluster = Cluster(
    initialize_head=True,
    head_node_args={'num_cpus': 0, 'include_dashboard': False, **store},
  )
  for _ in range(2):
    cluster.add_node(num_cpus=2, **store)
  yield cluster
  cluster.shutdown()


def worker_in_mid_trial(folder: Path, trial: str, sweep: subprocess.Popen) -> 'psutil.Process':
  """The process that runs a trial, as soon as the trial has a checkpoint."""
  log, checkpoints = folder / 'logs' / f'{trial}.txt', folder / 'trials' / trial / 'checkpoints'
  began = time.monotonic()
  while not any(path.name.isdigit() for path in checkpoints.glob('*')):
    assert sweep.poll() is None and time.monotonic() - began < LIMIT
    time.sleep(0.01)
  return psutil.Process(int(re.findall(r'process (\d+)', log.read_text())[-1]))


def test_a_worker_and_a_node_die_in_mid_trial(cluster, text, tmp_path):
  folder, log = tmp_path / 'ray', tmp_path / 'log.txt'
  longer = {'num_steps': 300, 'eval_every': 300, 'checkpoint_every': 20}
  flags = ('--engine=ray', f'--address={cluster.address}', '--resources=cpu=2')
  command = test_sweep.command(folder, text, *test_sweep.AXES, *flags, **longer)
  first, second = 'latent_dim=4,seed=0', 'latent_dim=8,seed=0'
  with log.open('w') as out, subprocess.Popen(command, stdout=out, stderr=out) as sweep:
    try:
      worker_in_mid_trial(folder, first, sweep).send_signal(signal.SIGKILL)
      raylet = worker_in_mid_trial(folder, second, sweep).parent()
      assert raylet is not None and 'raylet' in raylet.name()
      for process in [raylet, *raylet.children(recursive=True)]:  # a node dies with all it runs
        process.kill()
      assert sweep.wait(timeout=LIMIT) == 0, log.read_text()
    finally:
      sweep.kill()
  for trial in (first, second):
    printed = (folder / 'logs' / f'{trial}.txt').read_text()
    assert printed.count('process ') >= 2 and 'from step' in printed, printed
  assert test_sweep.run(tmp_path / 'local', text, *test_sweep.AXES, **longer).returncode == 0
  assert len(test_sweep.losses(folder)) == 4
  assert test_sweep.losses(folder) == test_sweep.losses(tmp_path / 'local')


def test_the_cloud_cluster_file_keeps_rays_schema():
  schema = Path(ray.__file__).parent / 'autoscaler' / 'ray-schema.json'
  cluster = yaml.safe_load((test_sweep.ROOT / 'docs' / 'cluster-tpu.yaml').read_text())
  jsonschema.validate(cluster, json.loads(schema.read_text()))
  assert cluster['head_node_type'] in cluster['available_node_types']


def test_no_cluster_at_the_address(text, tmp_path):
  done = run(tmp_path / 'sweep', text, '--engine=ray', '--address=127.0.0.1:1')
  assert done.returncode == 2
  assert '--address=127.0.0.1:1' in done.stderr.splitlines()[-1]
