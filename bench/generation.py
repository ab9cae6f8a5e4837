"""Our side of the decoding benches: greedy generation as one compiled loop with a donated cache."""

import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from bench import harness
from mla import sharding
from mla.cache import Cache
from mla.model import Decoder, allocate_cache, decode

STEPS, REPEATS = 16, 5  # tokens a measurement, measurements (and one before them, not counted)
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
  model: Decoder, starts: list[tuple[Cache, Int[Array, ' B']]]
) -> list[tuple[dict[str, Any], list[np.ndarray]]]:
  """For each (cache, first token): figures, and the tokens [B, STEPS] of each measurement.

  The starts take turns, so that a machine whose speed drifts is as fast for all of them.
  `ms_per_token` is the best measurement, `turns_ms` has all; `read_ms` and `turns_read_ms` are the
  same for a plain read of as many bytes by all cores.
  """

  def generate(model: Decoder, cache: Cache, token: Array):
    def step(carry, _):
      cache, token = carry
      logits, cache = decode(model, cache, token[:, None])
      return (cache, jnp.argmax(logits[:, 0], axis=-1).astype(token.dtype)), token

    (cache, token), tokens = jax.lax.scan(step, (cache, token), length=STEPS)
    return cache, token, tokens.T

  loops, sizes = [], [cache.nbytes() for cache, _ in starts]
  figures: list[dict[str, Any]] = []
  for state in starts:
    began = time.perf_counter()
    kept = jax.tree.map(lambda array: array.sharding, state)  # so that it can be called again
    jitted = jax.jit(generate, donate_argnums=1, out_shardings=(*kept, None))
    loops.append(jitted.lower(model, *state).compile())
    figures.append({'compile_seconds': time.perf_counter() - began})

  states = list(starts)
  times: list[list[float]] = [[] for _ in starts]
  reads: list[list[float]] = [[] for _ in starts]
  generated: list[list[np.ndarray]] = [[] for _ in starts]
  for _ in range(REPEATS + 1):
    for i, loop in enumerate(loops):
      began = time.perf_counter()
      cache, token, tokens = loop(model, *states[i])
      token.block_until_ready()
      times[i].append((time.perf_counter() - began) / STEPS)
      states[i] = cache, token
      generated[i].append(np.asarray(tokens))
      reads[i].append(time_to_read(sizes[i]))
  for i, of in enumerate(figures):
    of['turns_ms'], of['turns_read_ms'] = ([1e3 * t for t in x[i][1:]] for x in (times, reads))
    of['ms_per_token'], of['read_ms'] = min(of['turns_ms']), min(of['turns_read_ms'])
    of['cache_bytes'] = sizes[i]
  return list(zip(figures, generated, strict=True))


def time_to_read(size: int) -> float:
  """Seconds in which all cores together read `size` bytes of memory, read just before as well."""
  parts = np.array_split(np.ones(size // 4, np.int32), harness.cores())
  with ThreadPoolExecutor(len(parts)) as threads:
    list(threads.map(np.max, parts))
    began = time.perf_counter()
    list(threads.map(np.max, parts))
    return time.perf_counter() - began
