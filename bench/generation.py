"""Our side of the decoding benches: greedy generation as one compiled loop with a donated cache."""

import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mla import sharding
from mla.cache import Cache
from mla.model import Decoder, allocate_cache, decode

STEPS, REPEATS = 16, 3  # tokens a measurement, measurements (and one before them, not counted)
SLOTS = STEPS * (REPEATS + 1)  # what they need in the cache


def small_config(variant: str) -> ConfigDict:
  return importlib.import_module(f'configs.{variant}_small').get_config()


def mesh_of(devices: int) -> Mesh:
  """A data mesh over the first `devices` devices."""
  axes = ('data', 'fsdp', 'tensor')
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((devices, 1, 1), axes, axis_types=types, devices=jax.devices()[:devices])


def place(model: Decoder, cache: Cache, mesh: Mesh) -> tuple[Decoder, Cache]:
  """The model on every device, the cache split by rows."""
  rows = NamedSharding(mesh, PartitionSpec(sharding.RULES['B']))
  return jax.device_put(model, NamedSharding(mesh, PartitionSpec())), jax.device_put(cache, rows)


def noise_cache(model: Decoder, batch: int, context: int, dtype: str) -> Cache:
  """A cache that holds `context` tokens of noise a row, and room for a measurement."""
  empty = allocate_cache(model, batch=batch, slots=context + SLOTS, dtype=dtype)
  rng = np.random.default_rng(0)

  def fill(array: Array) -> Array:
    if array.dtype == jnp.int8:
      return jnp.asarray(rng.integers(-127, 128, array.shape, np.int8))
    return jnp.asarray(rng.random(array.shape, np.float32), array.dtype)

  return Cache(jax.tree.map(fill, empty.layers), jnp.full(batch, context, jnp.int32))


def time_generation(
  model: Decoder, cache: Cache, token: Int[Array, ' B']
) -> tuple[dict[str, float], list[np.ndarray]]:
  """(figures, each measurement's tokens [B, STEPS]); the best measurement counts."""

  def generate(model: Decoder, cache: Cache, token: Array):
    def step(carry, _):
      cache, token = carry
      logits, cache = decode(model, cache, token[:, None])
      return (cache, jnp.argmax(logits[:, 0], axis=-1).astype(token.dtype)), token

    (cache, token), tokens = jax.lax.scan(step, (cache, token), length=STEPS)
    return cache, token, tokens.T

  began = time.perf_counter()
  kept = jax.tree.map(
    lambda array: array.sharding, (cache, token)
  )  # so that it can be called again
  jitted = jax.jit(generate, donate_argnums=1, out_shardings=(*kept, None))
  loop = jitted.lower(model, cache, token).compile()
  compiling = time.perf_counter() - began
  cache_bytes, times, generated = cache.nbytes(), [], []
  for _ in range(REPEATS + 1):
    began = time.perf_counter()
    cache, token, tokens = loop(model, cache, token)
    token.block_until_ready()
    times.append((time.perf_counter() - began) / STEPS)
    generated.append(np.asarray(tokens))
  figures = {
    'ms_per_token': 1e3 * min(times[1:]),
    'compile_seconds': compiling,
    'cache_bytes': cache_bytes,
  }
  return figures, generated
