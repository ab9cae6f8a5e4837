"""The machines a dry run can be asked about, and their devices to compile for without having them.

Sources. TPUs: the tables of docs.cloud.google.com/tpu/docs/v5e, v5p and v6e; of the two directions
that "bidirectional" counts, links have one here, all of a chip's together. What a program may have
of the memory, somewhat less than the tables say, is what libtpu's compiler (0.0.42) names where it
refuses one. GPUs: NVIDIA's data sheets of H100 SXM5, H200 SXM, A100 SXM of 80 GB and L4 (dense
bfloat16; NVLink, of the L4 PCIe); the H100's memory as the driver reports it.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from mla import memory
from mla.errors import UserError, first_line

GIB = 2**30


class Chip(NamedTuple):
  """What one device has; None where nothing says it."""

  memory: int | None  # bytes that a program may have
  flops: float | None  # a second, bfloat16
  bandwidth: float | None  # of its memory, bytes a second
  links: float | None  # to other devices, bytes a second out of it


CHIPS = {
  'v5e': Chip(int(15.75 * GIB), 197e12, 819e9, 200e9),
  'v5p': Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9),
  'v6e': Chip(int(31.25 * GIB), 918e12, 1640e9, 400e9),
  'h100': Chip(84_978_434_048, 989.4e12, 3350e9, 450e9),
  'h200': Chip(141 * 10**9, 989.4e12, 4800e9, 450e9),
  'a100': Chip(80 * 10**9, 312e12, 2039e9, 300e9),
  'l4': Chip(24 * 10**9, 121e12, 300e9, 32e9),
}
# How a device that is there calls its kind.
KINDS = {
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'NVIDIA A100-SXM4-80GB': 'a100',
  'NVIDIA L4': 'l4',
}

# What XLA's GPU compiler has to know of an H100, as it describes one itself.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

EXAMPLES = 'v5e:2x4, v5e:16x16, v5p:2x2x1, v6e:2x4, h100, h100x8 or cpu'


class Target(NamedTuple):
  name: str
  chip: Chip
  devices: Sequence[jax.Device]


def chip(kind: str) -> Chip | None:
  """What a device that calls its kind so has; None of one that is not known, CPUs among them."""
  return CHIPS[KINDS[kind]] if kind in KINDS else None


def is_here(name: str | None) -> bool:
  """Whether the target is this machine, which train.py would use."""
  return name in (None, 'cpu')


def find(name: str | None) -> Target:
  """The target of this name; of None, what JAX finds here. Must come before JAX's first use.

  UserError for a name that is none, or whose compiler is not installed.
  """
  if is_here(name):
    if name:
      jax.config.update('jax_platforms', 'cpu')
    return _here()
  tpu = re.fullmatch(r'(v5e|v5p|v6e):\d+(x\d+){1,2}', str(name))
  gpu = re.fullmatch(r'(h100)(?:x([1-8]))?', str(name))
  if not (tpu or gpu):
    raise UserError(f'--target={name}: no such target; choose one such as {EXAMPLES}')
  jax.config.update('jax_platforms', 'cpu')  # no device here is to be looked for
  if tpu:
    return Target(str(name), CHIPS[tpu[1]], _tpus(str(name)))
  assert gpu
  return Target(str(name), CHIPS[gpu[1]], _gpus(str(name), int(gpu[2] or 1)))


def _here() -> Target:
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':  # they share the memory
    return Target('cpu', Chip(memory.available() // len(devices), None, None, None), devices)
  limit = (devices[0].memory_stats() or {}).get('bytes_limit')
  known = chip(kind) or Chip(None, None, None, None)
  return Target(kind, known._replace(memory=limit or known.memory), devices)


def _tpus(name: str) -> Sequence[jax.Device]:
  if not _installed('libtpu'):
    raise UserError(
      f"--target={name}: the TPU's compiler is not installed; pip install 'jax[tpu]=="
      f"{jax.__version__}'"
    )
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it asks a metadata server and hangs
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')  # several such processes at once
  # Else it complains on stderr that it finds neither.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
  return _topology(name, platform='tpu', topology_name=name)


def _gpus(name: str, count: int) -> Sequence[jax.Device]:
  needed = [f'jax_plugins.xla_cuda{version}' for version in (12, 13)]
  if not any(_installed(module) for module in needed) or not _installed('nvidia.cudnn'):
    raise UserError(
      f"--target={name}: the GPU's compiler is not installed; pip install 'jax[cuda12]=="
      f"{jax.__version__}'"
    )
  # Nothing can be run here, so nothing can be tuned by trying it.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_autotune_level=0'
  return _topology(
    name, platform='cuda', topology_name=name, topology=f'1x1x{count}', target_config=H100
  )


def _topology(name: str, **described) -> Sequence[jax.Device]:
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(**described).devices
  except Exception as error:  # whatever the plugin raises of a shape that is not sold
    raise UserError(
      f'--target={name}: its compiler refuses it ({first_line(error)}); choose one such as '
      f'{EXAMPLES}'
    ) from error


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # not even its package
    return False
