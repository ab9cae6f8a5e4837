"""The Ray engine gives the losses of the local one, even if a worker and a node die on the way."""

import json
import platform
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import test_sweep

from mla.sweep import ray_engine

ray = pytest.importorskip('ray')
Cluster = pytest.importorskip('ray.cluster_utils').Cluster
jsonschema, psutil, yaml = map(pytest.importorskip, ('jsonschema', 'psutil', 'yaml'))  # Ray's

LIMIT = 200  # seconds that one sweep may take


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


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="the allocator is glibc's")
def test_a_worker_keeps_freed_memory():
  def faults_of_a_second_block() -> int:
    """Page faults while malloc's second block of 100 MB is written, the first one freed."""
    import ctypes
    import resource

    from mla.backends.cpu import host

    host.keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size = ctypes.c_size_t(100 * 2**20)
    before = 0
    for _ in range(2):
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      block = ctypes.c_void_p(libc.malloc(size))
      libc.memset(block, 1, size)
      libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

  def on_a_thread() -> int:  # where Tune runs a trial
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      return threads.submit(faults_of_a_second_block).result()

  ray_engine._connect(None)
  try:
    assert ray.get(ray.remote(on_a_thread).remote()) < 1000  # new memory would cost 25,600
  finally:
    ray.shutdown()


STORE = {'object_store_memory': 80 * 2**20}


@pytest.fixture
def head():
  """A cluster whose first node computes nothing."""
  cluster = Cluster(
    initialize_head=True, head_node_args={'num_cpus': 0, 'include_dashboard': False, **STORE}
  )
  yield cluster
  cluster.shutdown()


@pytest.fixture
def cluster(head):
  """Three raylets: the head, and two nodes with room for a trial each."""
  for _ in range(2):
    head.add_node(num_cpus=2, **STORE)
  return head


@pytest.fixture
def slices(head):
  """Five raylets: the head, and two TPU slices of two hosts, whose chips are CPUs in truth."""
  of_slice = {'tpu-pod-type': 'v4-16', 'tpu-topology': '2x2x2', 'accelerator-type': 'TPU-V4'}
  for name in ('slice-a', 'slice-b'):
    for worker in ('0', '1'):
      labels = {'tpu-slice-name': name, 'tpu-worker-id': worker, **of_slice}
      lead = {'TPU-v4-16-head': 1} if worker == '0' else {}
      head.add_node(
        num_cpus=2,
        resources={'TPU': 4, 'accelerator_type:TPU-V4': 1, **lead},
        labels={f'ray.io/{label}': value for label, value in labels.items()},
        env_vars={
          'TPU_NAME': name,
          'TPU_WORKER_ID': worker,
          'TPU_ACCELERATOR_TYPE': 'v4-16',
          'TPU_TOPOLOGY': '2x2x2',
          'JAX_PLATFORMS': 'cpu',
        },
        **STORE,
      )
  return head


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


def test_a_worker_that_is_told_to_end_has_not_crashed(text, tmp_path):
  folder = tmp_path / 'ray'
  command = test_sweep.command(
    folder, text, '--sweep=seed=0', '--engine=ray', num_steps=300, checkpoint_every=20
  )
  start = folder / 'starts' / 'seed=0.json'
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as sweep:
    try:
      worker_in_mid_trial(folder, 'seed=0', sweep).send_signal(signal.SIGTERM)
      began = time.monotonic()
      while not json.loads(start.read_text())['told']:
        assert time.monotonic() - began < 60 and sweep.poll() is None
        time.sleep(0.01)
      assert sweep.wait(timeout=LIMIT) == 0
    finally:
      sweep.kill()
  assert (folder / 'logs' / 'seed=0.txt').read_text().count('process ') == 2


def test_sigterm_stops_the_sweep_and_says_so(text, tmp_path):
  command = test_sweep.command(
    tmp_path / 'ray', text, '--sweep=seed=0', '--engine=ray', num_steps=100_000
  )
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as sweep:
    try:
      worker_in_mid_trial(tmp_path / 'ray', 'seed=0', sweep)
      sweep.send_signal(signal.SIGTERM)
      out, err = sweep.communicate(timeout=LIMIT)
    finally:
      sweep.kill()
  assert sweep.returncode == 143, err
  assert 'run the same command again' in out


def test_trials_over_the_hosts_of_a_slice(slices, text, tmp_path):
  folder, log = tmp_path / 'ray', tmp_path / 'log.txt'
  axis, longer = '--sweep=learning_rate=1e-3,1e30', {'num_steps': 100, 'checkpoint_every': 20}
  flags = (
    '--engine=ray',
    f'--address={slices.address}',
    '--slice=TPU-V4:2x2x2',
    '--resources=TPU=4',
  )
  command = test_sweep.command(folder, text, axis, *flags, **longer)
  with log.open('w') as out, subprocess.Popen(command, stdout=out, stderr=out) as sweep:
    try:
      worker_in_mid_trial(folder, 'learning_rate=0.001', sweep).send_signal(signal.SIGKILL)
      assert sweep.wait(timeout=LIMIT) == 1, log.read_text()  # the other trial failed
    finally:
      sweep.kill()
  assert 'learning_rate=1e+30  FAILED: the loss is no longer finite' in log.read_text()
  printed = (folder / 'logs' / 'learning_rate=0.001.txt').read_text()
  assert 'from step' in printed and 'mesh data=2' in printed, printed
  test_sweep.run(tmp_path / 'local', text, axis, **longer)
  assert len(test_sweep.losses(folder)) == 1
  # Hosts may add up in another order than one host's devices.
  assert test_sweep.losses(folder) == pytest.approx(test_sweep.losses(tmp_path / 'local'), abs=1e-4)


def test_the_cloud_cluster_file_keeps_rays_schema():
  schema = Path(ray.__file__).parent / 'autoscaler' / 'ray-schema.json'
  cluster = yaml.safe_load((test_sweep.ROOT / 'docs' / 'cluster-tpu.yaml').read_text())
  jsonschema.validate(cluster, json.loads(schema.read_text()))
  assert cluster['head_node_type'] in cluster['available_node_types']


def test_no_cluster_at_the_address(text, tmp_path):
  done = run(tmp_path / 'sweep', text, '--engine=ray', '--address=127.0.0.1:1')
  assert done.returncode == 2
  assert '--address=127.0.0.1:1' in done.stderr.splitlines()[-1]
