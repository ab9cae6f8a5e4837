"""The whole model against Hugging Face transformers with the same weights: `make test-interop`."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ARMS, tiny_config

from mla.model import forward, make_model

pytest.importorskip('transformers', reason='extra [bench]; make test-interop installs it')


@pytest.mark.parametrize('arm', [arm for arm in ARMS if arm != 'mha_partial_rope'])
def test_logits_are_those_of_transformers(arm):
  import torch

  from bench.peers import make_peer

  values = 0 if ARMS[arm]['attention'] != 'mla' else 10  # a Llama's values are as wide as its keys
  config = tiny_config(arm, value_head_dim=values, rope_base=500.0)
  model = make_model(config, 61)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
  peer = make_peer(config, model, 'eager').eval()
  with torch.no_grad():
    expected = peer(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
  np.testing.assert_allclose(forward(model, jnp.asarray(tokens)), expected, atol=2e-5)
