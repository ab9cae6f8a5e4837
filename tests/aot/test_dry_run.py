"""Dry runs of the medium and the large configs, cut to two layers, for a v5e that isn't there."""

import importlib

import pytest

from mla import dry_run, memory
from mla.model import solve_ffn_dim

pytest.importorskip('libtpu')


def two_layers(name: str):
  config = importlib.import_module(f'configs.{name}').get_config()
  config.ffn_dim = solve_ffn_dim(config)
  config.update({'num_layers': 2, 'remat': 'latents', 'batch_size': 16, 'accumulation_steps': 1})
  config.mesh = {'data': 1, 'fsdp': -1, 'tensor': 1}
  return config


@pytest.mark.parametrize(
  ('name', 'chips'),
  [
    *(('mha_medium', 4), ('gqa_medium', 4), ('mqa_medium', 4), ('mla_medium', 8)),
    *(('mha_large', 4), ('gqa_large', 4), ('mqa_large', 4), ('mla_large', 4)),
  ],
)
def test_a_tpu_takes_it(name, chips):
  config = two_layers(name)
  report = dry_run.answer(config, target={4: 'v5e:2x2', 8: 'v5e:2x4'}[chips], price=1.0)
  assert report['fits'] and report['kernels'] == ['tpu_custom_call'], report
  assert report['devices'] == chips
  # Weights, and Adam's two moments, all float32 and each split over the chips.
  assert report['argument_bytes_per_device'] < 1.2 * 12 * report['params_total'] / chips
  # Each device gives the others its part of the weights for the forward and for the backward pass,
  # in bfloat16 at the least, and of the gradients theirs, but for what is whole on every device.
  body = report['params_total'] - memory.vocabulary(config) * config.d_model  # a lookup is not
  assert report['collective_bytes_per_step'] > 0.8 * 3 * 2 * body * (chips - 1) / chips
  assert report['step_seconds_at_least'] >= report['seconds_at_least']['compute'] > 0
  assert report['run']['dollars'] > 0
