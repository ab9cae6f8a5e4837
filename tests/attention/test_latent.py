"""MLA against a direct transcription of the paper's equations into numpy.

DeepSeek-V2 (arXiv 2405.04434): equations 9-19 of section 2.1 and the full list 37-47 of appendix C,
one token and one head at a time, sharing no code with the module.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from mla import cache as cache_lib
from mla.attention import append
from mla.attention.latent import LatentAttention

LENGTH, BASE = 11, tiny_config().rope_base


def rms_norm(x, gain):
  return x / np.sqrt(np.mean(x**2) + 1e-6) * gain


def rotate(x, position):
  """RoPE as a product with a block-rotation matrix; dims i and i + R/2 are a pair."""
  half = len(x) // 2
  matrix = np.zeros((len(x), len(x)))
  for i in range(half):
    angle = position * BASE ** (-2 * i / len(x))
    matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
    matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
  return matrix @ x


def paper(weights: dict[str, np.ndarray], h: np.ndarray, heads: int, nope: int) -> np.ndarray:
  """u_t for each token t, from the hidden states h [T, D]."""
  latents, rotary_keys, outputs = [], [], []
  for t in range(len(h)):
    latents.append(rms_norm(h[t] @ weights['w_dkv'], weights['latent_norm']))  # (41), normed
    rotary_keys.append(rotate(h[t] @ weights['w_kr'], t))  # (43)
    if 'w_dq' in weights:
      c_q = rms_norm(h[t] @ weights['w_dq'], weights['query_norm'])  # (37), normed
      queries = np.einsum('q,qhn->hn', c_q, weights['w_uq'])  # (38), (39) before rotation
    else:
      queries = np.einsum('d,dhn->hn', h[t], weights['w_q'])
    u = np.zeros(h.shape[1])
    for i in range(heads):
      q = np.concatenate([queries[i, :nope], rotate(queries[i, nope:], t)])  # (40)
      scores, values = [], []
      for j in range(t + 1):
        k_c = latents[j] @ weights['w_uk'][:, i]  # (42)
        k = np.concatenate([k_c, rotary_keys[j]])  # (44)
        scores.append(q @ k / np.sqrt(len(q)))  # (46): the root of d_h + d_h^R
        values.append(latents[j] @ weights['w_uv'][:, i])  # (45)
      shares = np.exp(scores) / np.sum(np.exp(scores))
      u += (shares @ np.array(values)) @ weights['w_o'][i]  # (46), (47)
    outputs.append(u)
  return np.array(outputs)


def build(arm):
  config = tiny_config(arm)
  attention = LatentAttention(config, nnx.Rngs(params=5))
  for norm in ('latent_norm', 'query_norm'):  # gains of one would hide a gain left out
    if hasattr(attention, norm):
      gain = getattr(attention, norm).gain
      gain[...] = 1 + 0.3 * jax.random.normal(jax.random.key(1), gain.shape)
  weights = {
    path[0]: np.asarray(leaf[...], np.float64)
    for path, leaf in nnx.to_flat_state(nnx.state(attention, nnx.Param))
  }
  x = np.random.default_rng(2).normal(size=(LENGTH, config.d_model))
  return config, attention, weights, x


@pytest.mark.parametrize('arm', ['mla', 'mla_query_latent'])
def test_expanded_is_the_paper(arm):
  config, attention, weights, x = build(arm)
  positions = jnp.arange(LENGTH)[None]
  inputs = jnp.asarray(x[None], jnp.float32)
  got = attention.attend(inputs, attention.compress(inputs, positions), positions)[0]
  expected = paper(weights, x, config.num_heads, config.head_dim)
  np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize('arm', ['mla', 'mla_query_latent'])
def test_absorbed_one_token_at_a_time_is_the_paper(arm):
  config, attention, weights, x = build(arm)
  shapes = attention.cache_shapes()
  (layer,) = cache_lib.allocate([shapes], batch=1, slots=LENGTH, dtype='float32').layers
  outputs = []
  for t in range(LENGTH):
    token = jnp.asarray(x[None, t : t + 1], jnp.float32)
    position = jnp.full((1, 1), t)
    layer = append(layer, attention.compress(token, position), position[:, 0])
    outputs.append(attention.attend_cached(token, layer, position)[0, 0])
  expected = paper(weights, x, config.num_heads, config.head_dim)
  np.testing.assert_allclose(np.array(outputs), expected, atol=2e-5)


def test_the_cache_holds_the_normed_latent_and_the_rotated_key():
  config, attention, weights, x = build('mla')
  entries = attention.compress(jnp.asarray(x[None], jnp.float32), jnp.arange(LENGTH)[None])
  latent = [rms_norm(row @ weights['w_dkv'], weights['latent_norm']) for row in x]
  key = [rotate(row @ weights['w_kr'], t) for t, row in enumerate(x)]
  assert attention.cache_shapes() == {'latent': (14,), 'k_rope': (4,)}
  np.testing.assert_allclose(entries['latent'][0], latent, atol=1e-5)
  np.testing.assert_allclose(entries['k_rope'][0], key, atol=1e-5)


def test_keys_and_values_keep_their_scale_as_the_latent_shrinks():
  x = jax.random.normal(jax.random.key(0), (1, 64, 256))
  for latent_dim in (4, 64):
    config = tiny_config('mla', d_model=256, latent_dim=latent_dim)
    attention = LatentAttention(config, nnx.Rngs(params=0))
    latent = attention.compress(x, jnp.arange(64)[None])['latent']
    for up in (attention.w_uk, attention.w_uv):
      assert 0.7 < float(jnp.std(jnp.einsum('btc,chn->bthn', latent, up[...]))) < 1.4
