"""The whole model against Hugging Face transformers with the same weights: `make test-interop`."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ARMS, tiny_config

from mla.model import forward, make_model

pytest.importorskip('transformers', reason='extra [bench]; make test-interop installs it')


# A Llama's values are as wide as its keys, and it rotates all of a key; others have no peer.
VALUES = {'mha': 0, 'gqa': 0, 'mqa': 0, 'mla': 10}
WITH_PEER = [
  arm
  for arm, fields in ARMS.items()
  if fields['attention'] in VALUES and arm not in ('mha_partial_rope', 'mla_nested')
]


@pytest.mark.parametrize('arm', WITH_PEER)
def test_logits_are_those_of_transformers(arm):
  import torch

  from bench.peers import make_peer

  values = VALUES[ARMS[arm]['attention']]
  config = tiny_config(arm, value_head_dim=values, rope_base=500.0)
  model = make_model(config, 61)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
  peer = make_peer(config, model, 'eager').eval()
  with torch.no_grad():
    expected = peer(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
  np.testing.assert_allclose(forward(model, jnp.asarray(tokens)), expected, atol=2e-5)
