"""What XLA's compiler for an H100 makes of the program, on a machine without one."""

import re

import pytest
from jax.sharding import Mesh
from programs import ARMS, compiled_generation, compiled_step, config_of, mesh_of

from mla import targets


@pytest.fixture(scope='module')
def mesh() -> Mesh:
  return mesh_of(targets.find('h100').devices, (1, 1, 1))


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
