"""What XLA's compiler for an H100 makes of the program, on a machine without one."""

import re

import pytest
from jax.experimental import topologies
from jax.sharding import Mesh
from programs import ARMS, compiled_generation, compiled_step, config_of, mesh_of

# As CUDA describes the card.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope='module')
def mesh() -> Mesh:
  topology = topologies.get_topology_desc(
    platform='cuda', topology_name='h100', topology='1x1x1', target_config=H100
  )
  return mesh_of(topology.devices, (1, 1, 1))


@pytest.mark.parametrize('arm', ARMS)
@pytest.mark.parametrize('remat', ['none', 'latents'])
def test_training_runs_cudnns_kernels_and_no_loop(mesh, arm, remat):
  text = compiled_step(config_of(arm, remat=remat), mesh).as_text()
  calls = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
  assert any('Backward' in call for call in calls) and any('Backward' not in call for call in calls)
  # With remat the layers are a loop, forward and backward. Attention has none.
  assert len(re.findall(r' while\(', text)) <= (0 if remat == 'none' else 2)


@pytest.mark.parametrize('arm', ARMS)
def test_prompts_and_decoding_compile(mesh, arm):
  assert '__cudnn$fmha' in compiled_generation(config_of(arm), mesh).as_text()
