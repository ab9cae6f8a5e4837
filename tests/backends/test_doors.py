"""The door, the same for every backend: what does not fit is refused; and which one is chosen."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_config
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mla import backends
from mla import model as model_lib
from mla.backends import cpu
from mla.cache import Stored, allocate, quantise
from mla.config import ATTENTION_IMPLS
from mla.errors import UserError
from mla.train import train_and_evaluate

compiled = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())
IMPLS = [pytest.param('cpu', marks=compiled), 'blockwise']
KEY = jax.random.key(0)


def draw(*shape: int, dtype=jnp.float32):
  return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape, dtype)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize(
  ('queries', 'keys', 'values', 'said'),
  [
    ((2, 5, 4, 8), (2, 5, 3, 8), (2, 5, 3, 6), 'do not share 3 key heads'),
    ((2, 5, 4, 8), (2, 4, 2, 8), (2, 5, 2, 6), r'keys\[0\]'),
    ((2, 5, 4, 8), (2, 5, 2, 7), (2, 5, 2, 6), r'keys\[0\]'),
    ((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 2, 6), r'keys\[0\]'),
    ((2, 5, 4), (2, 5, 4), (2, 5, 4), r'queries\[0\]'),
    ((2, 5, 4, 8), (2, 5, 2, 8), (1, 5, 2, 6), 'values'),
  ],
)
def test_the_door_names_the_array_that_does_not_fit(impl, queries, keys, values, said):
  with pytest.raises(ValueError, match=said) as caught:
    backends.causal_attention([draw(*queries)], [draw(*keys)], draw(*values), scale=1.0, impl=impl)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize(
  ('spoil', 'said'),
  [
    (lambda q, k, v, p: (q[:, :, :3], k, v, p), 'do not share 2 key heads'),
    (lambda q, k, v, p: (q, k[:1], v, p), r'cached keys\[0\]'),
    (lambda q, k, v, p: (q, k[:, :, :8], v, p), r'cached keys\[0\]'),
    (lambda q, k, v, p: (q, k[..., :7], v, p), r'cached keys\[0\]'),
    (lambda q, k, v, p: (q, k[:, :, 0], v, p), r'cached keys\[0\]'),
    (lambda q, k, v, p: (q, k.astype(jnp.float16), v, p), 'float16; must be one of float32'),
    (lambda q, k, v, p: (q, k, v.astype(jnp.int8), p), 'int8, scales: False'),
    (lambda q, k, v, p: (q, k, v, p.astype(jnp.float32)), 'positions: float32'),
    (lambda q, k, v, p: (q, k, v, p[:1]), 'positions'),
    (lambda q, k, v, p: (q.astype(jnp.int32), k, v, p), 'queries: int32; must be floats'),
  ],
)
def test_the_door_to_a_cache_names_what_does_not_fit(impl, spoil, said):
  arrays = draw(2, 1, 4, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 6), jnp.array([[3], [8]])
  query, key, values, positions = spoil(*arrays)
  with pytest.raises(ValueError, match=said) as caught:
    backends.cached_attention(
      [query], [Stored(key, None)], [Stored(values, None)], positions, scale=1.0, impl=impl
    )
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize(
  'starts', [jnp.zeros((2, 4), int), jnp.zeros((1, 5), int), jnp.zeros((2, 5))]
)
def test_starts_that_do_not_fit_are_named(impl, starts):
  x, at = draw(2, 5, 4, 8), jnp.arange(5)[None] + jnp.zeros((2, 1), int)
  stored = Stored(draw(2, 4, 9, 8), None)
  with pytest.raises(ValueError, match='starts'):
    backends.causal_attention([x], [x], x, scale=1.0, starts=starts, impl=impl)
  with pytest.raises(ValueError, match='starts'):
    backends.cached_attention([x], [stored], [stored], at, scale=1.0, starts=starts, impl=impl)


@pytest.mark.parametrize('impl', IMPLS)
def test_starts_beyond_the_token_give_nan_to_it_alone(impl):
  x = draw(1, 5, 4, 8)
  starts = jnp.array([[0, 3, 0, -7, 2**31 - 1]])
  out = backends.causal_attention([x], [x], x, scale=1.0, starts=starts, impl=impl)
  assert np.isnan(out).all(axis=(0, 2, 3)).tolist() == [False, True, False, False, True]
  assert np.isfinite(out[:, [0, 2, 3]]).all()
  stored, at = Stored(x.swapaxes(1, 2), None), jnp.arange(5)[None]
  out = backends.cached_attention([x], [stored], [stored], at, scale=1.0, starts=starts, impl=impl)
  assert np.isnan(out).all(axis=(0, 2, 3)).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize('impl', IMPLS)
def test_what_is_of_mixed_dtypes_is_refused(impl):
  q, k, v = draw(2, 5, 4, 8), draw(2, 5, 2, 8), draw(2, 5, 2, 6)
  with pytest.raises(ValueError, match='values: bfloat16, queries float32'):
    backends.causal_attention([q], [k], v.astype(jnp.bfloat16), scale=1.0, impl=impl)


@pytest.mark.parametrize('impl', IMPLS)
def test_float64_is_computed_as_such(impl):
  """The C++ has no float64: it leaves that to blockwise."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, 6, 2, 4)) for _ in range(3))
  with jax.enable_x64(True):
    attend = functools.partial(backends.causal_attention, scale=0.5, impl=impl)
    got = attend([jnp.asarray(q)], [jnp.asarray(k)], jnp.asarray(v))
  assert got.dtype == np.float64
  for t, h in np.ndindex(6, 2):
    weights = np.exp(k[0, : t + 1, h] @ q[0, t, h] * 0.5)
    np.testing.assert_allclose(got[0, t, h], weights @ v[0, : t + 1, h] / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 1, 2)])
def test_a_key_part_of_one_head_is_shared_by_two_value_heads(impl, sizes):
  """Read through a cache, as float64 numpy has it; the C++ read it out of bounds."""
  axes = ('data', 'fsdp', 'tensor')
  devices = jax.devices()[: np.prod(sizes)]
  mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
  rng = np.random.default_rng(0)
  q = [rng.standard_normal((2, 1, 4, n)).astype(np.float32) for n in (8, 4)]
  k = rng.standard_normal((2, 2, 9, 8)), rng.standard_normal((2, 1, 9, 4))
  v = rng.standard_normal((2, 2, 9, 6))
  positions = np.array([[8], [4]])
  stored = [Stored(jnp.asarray(x, jnp.float32), None) for x in (*k, v)]
  read = functools.partial(backends.cached_attention, scale=0.3, impl=impl)
  with jax.set_mesh(mesh):
    got = jax.jit(read)([jnp.asarray(x) for x in q], stored[:2], stored[2:], jnp.asarray(positions))
  keys = np.concatenate([k[0], np.broadcast_to(k[1], (2, 2, 9, 4))], -1)
  queries = np.concatenate(q, -1).astype(np.float64)
  for b, h in np.ndindex(2, 4):
    seen = positions[b, 0] + 1
    scores = keys[b, h // 2, :seen] @ queries[b, 0, h] * 0.3
    weights = np.exp(scores - scores.max())
    expected = weights @ v[b, h // 2, :seen] / weights.sum()
    np.testing.assert_allclose(got[b, 0, h], expected, atol=1e-5)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', [np.int8, np.int16, np.uint32])
def test_positions_of_any_integer_dtype_mean_the_same(impl, dtype):
  stored = [Stored(draw(2, 2, 9, n), None) for n in (8, 6)]
  read = functools.partial(backends.cached_attention, scale=1.0, impl=impl)
  got, expected = (
    read([draw(2, 1, 4, 8)], stored[:1], stored[1:], jnp.array([[3], [8]], d))
    for d in (dtype, jnp.int32)
  )
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('impl', IMPLS)
def test_an_int8_cache_needs_its_scales_and_no_other_has_any(impl):
  values, scale = quantise(draw(2, 2, 9, 8))
  for stored in (Stored(values, None), Stored(values.astype(jnp.float32), scale)):
    with pytest.raises(ValueError, match='scales'):
      backends.append(stored, draw(2, 1, 2, 8), jnp.zeros(2, jnp.int32), impl=impl)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('impl', IMPLS)
def test_a_row_without_room_keeps_what_it_has_and_the_others_are_written(impl, dtype):
  layer = allocate([{'k': (2, 8)}], batch=2, slots=5, dtype=dtype).layers[0]
  append = functools.partial(backends.append, impl=impl)
  full = append(layer['k'], draw(2, 5, 2, 8), jnp.zeros(2, jnp.int32))
  after = append(full, draw(2, 2, 2, 8), jnp.array([4, 3], jnp.int32))
  for before, now in zip(jax.tree.leaves(full), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(now[0], before[0])
    assert not np.array_equal(now[1], before[1])
  with pytest.raises(ValueError, match='6 tokens do not fit in a cache of 5 slots'):
    append(full, draw(2, 6, 2, 8), jnp.zeros(2, jnp.int32))


def test_slots_that_may_be_split_are_written_alike():
  """Two rows on eight devices; runs that end a row, would overrun it, and have no place in it."""
  into, new = draw(2, 2, 9, 8), draw(2, 2, 3, 8)
  for starts in ([0, 6], [7, 4], [-1, 2], [9, 5]):
    starts = jnp.array(starts, jnp.int32)
    expected = backends.blockwise.append(into, new, starts, 2)
    with jax.set_mesh(mesh_of((8, 1, 1))):
      found = jax.jit(backends.blockwise.append, static_argnums=3)(into, new, starts, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize(
  ('arm', 'dtype'), [('mla', 'float32'), ('mqa', 'bfloat16'), ('gqa', 'int8')]
)
def test_decoding_past_the_end_is_never_a_wrong_logit(impl, arm, dtype):
  """Refused where shapes tell it; else NaN, then and ever after, in the row without room only."""
  config = tiny_config(arm, attention_impl=impl, num_layers=1)
  model = model_lib.make_model(config, 11)
  cache = model_lib.allocate_cache(model, batch=2, slots=10, dtype=dtype)
  tokens = jnp.ones((2, 20), jnp.int32)
  decode = jax.jit(lambda cache, tokens: model_lib.decode(model, cache, tokens))
  with pytest.raises(ValueError, match='20 tokens do not fit in a cache of 10 slots'):
    decode(cache, tokens)
  prefill = jax.jit(functools.partial(model_lib.prefill, model))
  _, cache = prefill(cache, tokens[:, :9], jnp.array([9, 4]))
  found = []
  for _ in range(3):
    logits, cache = decode(cache, tokens[:, :2])
    assert np.all(np.isnan(logits[0]))
    found.append(logits[1])
  whole = jax.jit(lambda tokens: model_lib.forward(model, tokens))(tokens[:1, :10])
  bound = {'float32': 1e-4, 'bfloat16': 0.05, 'int8': 0.05}[dtype]
  np.testing.assert_allclose(np.concatenate(found), whole[0, 4:], atol=bound)
  assert np.all(np.isnan(decode(cache, tokens[:, :1])[0]))  # now the other is full too


@pytest.mark.parametrize('impl', IMPLS)
def test_a_length_that_a_prompt_cannot_have_gives_nothing_that_looks_real(impl):
  model = model_lib.make_model(tiny_config('mla', attention_impl=impl, num_layers=1), 11)
  cache = model_lib.allocate_cache(model, batch=4, slots=12, dtype='float32')
  prompts, lengths = jnp.ones((4, 5), jnp.int32), jnp.array([6, 3, -1, 0])

  @jax.jit
  def run(cache):
    _, cache = model_lib.prefill(model, cache, prompts, lengths)
    return model_lib.decode(model, cache, prompts[:, :1])[0]

  logits = run(cache)
  assert [bool(np.all(np.isnan(row))) for row in logits] == [True, False, True, False]
  key = jax.random.key(0, impl=model_lib.PRNG)
  tokens, _ = model_lib.generate(model, cache, prompts, lengths, key, steps=3)
  assert np.all(np.asarray(tokens)[[0, 2, 3]] == -1) and np.all(np.asarray(tokens)[1] >= 0)


# Which backend.


def test_an_implementation_that_cannot_run_here_is_refused():
  with pytest.raises(UserError, match='attention_impl=splash'):
    backends.causal_attention(
      [draw(1, 4, 2, 8)], [draw(1, 4, 2, 8)], draw(1, 4, 2, 8), scale=1.0, impl='splash'
    )


def calls_cpp(impl: str) -> bool:
  """Whether a forward pass, as it is lowered, calls the C++."""
  config = tiny_config('mha', attention_impl=impl, num_layers=1)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: model_lib.make_model(config, 11)))

  def run(params, tokens):
    return model_lib.forward(nnx.merge(graphdef, params), tokens)

  tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
  return 'mla_causal_forward' in jax.jit(run).lower(params, tokens).as_text()


@compiled
def test_the_config_chooses_the_backend():
  assert [calls_cpp(impl) for impl in ('auto', 'cpu', 'blockwise')] == [True, True, False]


TPU = AbstractDevice(device_kind='TPU v5e', num_cores=1, platform='tpu')


def test_the_mesh_chooses_the_backend():
  """Here nothing but a CPU is found: what is compiled for a TPU must not call its C++."""
  axes, types = ('data', 'fsdp', 'tensor'), (AxisType.Auto,) * 3
  mesh = AbstractMesh((1, 1, 1), axes, axis_types=types, abstract_device=TPU)
  x, layer = draw(2, 8, 4, 8), allocate([{'k': (4, 8)}], batch=2, slots=9, dtype='int8')

  def run(x, stored):
    stored = backends.append(stored, x, jnp.zeros(2, jnp.int32))
    at = jnp.zeros((2, 8), jnp.int32)
    read = backends.cached_attention([x], [stored], [stored], at, scale=1.0)
    return read + backends.causal_attention([x], [x], x, scale=1.0)

  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(run).trace(x, layer.layers[0]['k']).lower(lowering_platforms=('tpu',))
    assert 'mla_' not in lowered.as_text()
    with pytest.raises(UserError, match='attention_impl=cpu: is not for tpu'):
      backends.causal_attention([x], [x], x, scale=1.0, impl='cpu')


def test_config_and_door_know_the_same_backends():
  assert set(ATTENTION_IMPLS) == {'auto', 'blockwise', *backends.PLATFORMS}


def test_a_run_that_cannot_have_its_backend_makes_nothing(text, tmp_path, monkeypatch):
  config = tiny_config('mla', attention_impl='cpu', data__files=str(text))
  monkeypatch.setattr(cpu, 'missing', lambda: 'there is no C++ compiler')
  with pytest.raises(UserError, match='attention_impl=cpu: there is no C.. compiler'):
    train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


WITHOUT = """
import sys
sys.modules['mla.backends.cpu'] = None
import jax, jax.numpy as jnp
from mla import backends
backends.prepare(2)
x = jnp.ones((1, 4, 2, 8))
out = backends.causal_attention([x], [x], x, scale=1.0)
assert out.shape == x.shape and bool(jnp.all(out == 1)), out
from mla.layers import RMSNorm
print(float(RMSNorm(D=8)(x)[0, 0, 0, 0]))
"""


def test_without_the_cpu_plugin_everything_still_works():
  done = subprocess.run([sys.executable, '-c', WITHOUT], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert abs(float(done.stdout) - 1) < 1e-5
