"""The door and the C++ entries behind it: what does not fit is refused, not read out of bounds."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from mla import backends
from mla import model as model_lib
from mla.backends import cpu
from mla.cache import Stored, allocate, quantise
from mla.errors import UserError

compiled = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())
IMPLS = [pytest.param('cpu', marks=compiled), 'blockwise']
KEY = jax.random.key(0)


def draw(*shape: int, dtype=jnp.float32):
  return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape, dtype)


# The entries themselves, as anybody can call them.

CAUSAL = [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)]  # queries, keys, values
SPOILT_CAUSAL = {
  'bfloat16 queries': lambda q, k, v: (q.astype(jnp.bfloat16), k, v),
  'integer keys': lambda q, k, v: (q, k.astype(jnp.int32), v),
  'keys of three axes': lambda q, k, v: (q, k[0], v),
  'keys of another batch': lambda q, k, v: (q, k[:1], v),
  'a shorter key': lambda q, k, v: (q, k[:, :3], v),
  'keys of other dims': lambda q, k, v: (q, k[..., :4], v),
  'values of another length': lambda q, k, v: (q, k, v[:, :4]),
  'three key heads for four queries': lambda q, k, v: (q, draw(2, 5, 3, 8), draw(2, 5, 3, 6)),
  'two key heads beside four of the values': lambda q, k, v: (q, k, draw(2, 5, 4, 6)),
  'an array less': lambda q, k, v: (q, k),
}


@compiled
@pytest.mark.parametrize('spoil', SPOILT_CAUSAL.values(), ids=SPOILT_CAUSAL)
def test_the_causal_entry_refuses_what_does_not_fit(spoil):
  results = [jax.ShapeDtypeStruct((2, 5, 4, 6), jnp.float32)]
  results += [jax.ShapeDtypeStruct((2, 4, 5), jnp.float32)]
  call = jax.ffi.ffi_call('mla_causal_forward', results)
  arrays = [draw(*shape) for shape in CAUSAL]
  call(*arrays, parts=np.int64(1), scale=np.float32(1))  # as they are, they fit
  with pytest.raises(jax.errors.JaxRuntimeError, match='INVALID_ARGUMENT'):
    jax.block_until_ready(call(*spoil(*arrays), parts=np.int64(1), scale=np.float32(1)))


def cached_arrays() -> dict[str, jax.Array]:
  """Two rows, two key heads of four queries, twelve slots: B and K are one axis."""
  return {
    'queries': draw(2, 1, 4, 8),
    'keys': draw(4, 12, 8),
    'key scales': jnp.zeros((4, 0)),
    'values': draw(4, 12, 6),
    'value scales': jnp.zeros((4, 0)),
    'positions': jnp.array([[3], [11]], jnp.int32),
  }


SPOILT_CACHED = {
  'int64-sized positions': ('positions', lambda x: x.astype(jnp.float32)),
  'positions of one row': ('positions', lambda x: x[:1]),
  'float16 keys': ('keys', lambda x: x.astype(jnp.float16)),
  'int8 without scales': ('keys', lambda x: x.astype(jnp.int8)),
  'fewer slots of values': ('values', lambda x: x[:, :11]),
  'three heads in all': ('keys', lambda x: x[:3]),
  'other dims': ('keys', lambda x: x[..., :7]),
  'half-precision queries': ('queries', lambda x: x.astype(jnp.bfloat16)),
}


@compiled
@pytest.mark.parametrize(('name', 'spoil'), SPOILT_CACHED.values(), ids=SPOILT_CACHED)
def test_the_cached_entry_refuses_what_does_not_fit(name, spoil):
  call = jax.ffi.ffi_call('mla_cached_forward', [jax.ShapeDtypeStruct((2, 1, 4, 6), jnp.float32)])
  arrays = cached_arrays()
  call(*arrays.values(), parts=np.int64(1), scale=np.float32(1))
  arrays[name] = spoil(arrays[name])
  with pytest.raises(jax.errors.JaxRuntimeError, match='INVALID_ARGUMENT'):
    jax.block_until_ready(call(*arrays.values(), parts=np.int64(1), scale=np.float32(1)))


@compiled
@pytest.mark.parametrize(
  ('new', 'starts', 'axis'),
  [
    (draw(2, 13, 4), jnp.zeros(2, jnp.int32), 1),  # more slots than there are
    (draw(2, 3, 5), jnp.zeros(2, jnp.int32), 1),
    (draw(2, 3, 4).astype(jnp.bfloat16), jnp.zeros(2, jnp.int32), 1),
    (draw(2, 3, 4), jnp.zeros(1, jnp.int32), 1),
    (draw(2, 3, 4), jnp.zeros(2, jnp.float32), 1),
    (draw(2, 3, 4), jnp.zeros(2, jnp.int32), 7),
  ],
)
def test_the_append_entry_refuses_what_does_not_fit(new, starts, axis):
  into = draw(2, 12, 4)
  call = jax.ffi.ffi_call('mla_append', jax.ShapeDtypeStruct(into.shape, into.dtype))
  with pytest.raises(jax.errors.JaxRuntimeError, match='INVALID_ARGUMENT'):
    jax.block_until_ready(call(into, new, starts, axis=np.int64(axis)))


# The door, the same for every backend.


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
def test_a_key_part_of_one_head_is_shared_by_two_value_heads(impl):
  """Read through a cache, as float64 numpy has it; the C++ read it out of bounds."""
  rng = np.random.default_rng(0)
  q = [rng.standard_normal((2, 1, 4, n)).astype(np.float32) for n in (8, 4)]
  k = rng.standard_normal((2, 2, 9, 8)), rng.standard_normal((2, 1, 9, 4))
  v = rng.standard_normal((2, 2, 9, 6))
  positions = np.array([[8], [4]])
  stored = [Stored(jnp.asarray(x, jnp.float32), None) for x in (*k, v)]
  got = backends.cached_attention(
    [jnp.asarray(x) for x in q], stored[:2], stored[2], jnp.asarray(positions), scale=0.3, impl=impl
  )
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
    read([draw(2, 1, 4, 8)], stored[:1], stored[1], jnp.array([[3], [8]], d))
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
  layer = allocate({'k': (2, 8)}, num_layers=1, batch=2, slots=5, dtype=dtype).layers[0]
  append = functools.partial(backends.append, impl=impl)
  full = append(layer['k'], draw(2, 5, 2, 8), jnp.zeros(2, jnp.int32))
  after = append(full, draw(2, 2, 2, 8), jnp.array([4, 3], jnp.int32))
  for before, now in zip(jax.tree.leaves(full), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(now[0], before[0])
    assert not np.array_equal(now[1], before[1])
  with pytest.raises(ValueError, match='6 tokens do not fit in a cache of 5 slots'):
    append(full, draw(2, 6, 2, 8), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize('impl', IMPLS)
def test_decoding_past_the_end_is_never_a_wrong_logit(impl):
  """Refused where shapes tell it; else NaN, in the row without room only."""
  config = tiny_config('mla', attention_impl=impl, num_layers=1)
  model = model_lib.make_model(config, 11)
  cache = model_lib.allocate_cache(model, batch=2, slots=10, dtype='float32')
  tokens = jnp.ones((2, 20), jnp.int32)
  with pytest.raises(ValueError, match='20 tokens do not fit in a cache of 10 slots'):
    model_lib.decode(model, cache, tokens)
  _, cache = model_lib.prefill(model, cache, tokens[:, :9], jnp.array([9, 4]))
  logits, cache = model_lib.decode(model, cache, tokens[:, :2])
  assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1]))
  whole = model_lib.forward(model, jnp.ones((1, 6), jnp.int32))
  np.testing.assert_allclose(logits[1], whole[0, 4:], atol=1e-4)


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
