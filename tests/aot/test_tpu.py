"""What the TPU's own compiler makes of the program, on a machine without one."""

import re

import pytest
from jax.sharding import Mesh
from programs import (
  ARMS,
  compiled_generation,
  compiled_reading,
  compiled_step,
  config_of,
  mesh_of,
)

from mla import targets


def v5e(*sizes: int) -> Mesh:
  """Eight chips of a v5e."""
  return mesh_of(targets.find('v5e:2x4').devices, sizes)


@pytest.mark.parametrize('arm', ARMS)
@pytest.mark.parametrize('remat', ['none', 'latents'])
def test_training_runs_splash_attention_and_no_loop(arm, remat):
  text = compiled_step(config_of(arm, remat=remat), v5e(2, 2, 2)).as_text()
  kernels = set(re.findall(r'splash_m[hq]a_(\w+?)_', text))
  assert kernels == {'fwd', 'dq', 'dkv'} and 'tpu_custom_call' in text
  # With remat the layers are a loop, forward and backward. Attention has none.
  assert len(re.findall(r' while\(', text)) <= (0 if remat == 'none' else 2)


@pytest.mark.parametrize('arm', ['gqa', 'mla'])
def test_documents_are_kept_apart_by_the_same_kernels(arm):
  config = config_of(arm, data={'packing': 'documents'}, remat='latents')
  text = compiled_step(config, v5e(2, 2, 2)).as_text()
  assert set(re.findall(r'splash_m[hq]a_(\w+?)_', text)) == {'fwd', 'dq', 'dkv'}
  assert len(re.findall(r' while\(', text)) <= 2


@pytest.mark.parametrize('arm', ARMS)
def test_prompts_and_decoding_compile(arm):
  assert 'tpu_custom_call' in compiled_generation(config_of(arm), v5e(8, 1, 1)).as_text()


@pytest.mark.parametrize('arm', ARMS)
def test_evaluation_gathers_no_cache_and_weights_only_in_its_loop(arm):
  """Eight windows by rows, with weights shared; and one, whose slots are split."""
  shared = compiled_reading(config_of(arm), v5e(1, 8, 1), batch=8).as_text()
  assert ' all-gather' in shared and ' all-gather' not in shared[shared.index('\nENTRY') :]
  assert not re.findall(r'= \w+\[[\d,]*\b256\b[\d,]*\]\S* all-gather', shared)
  alone = compiled_reading(config_of(arm), v5e(8, 1, 1), batch=1).as_text()
  assert ' all-gather' not in alone and ' all-reduce' in alone
