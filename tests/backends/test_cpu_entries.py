"""The C++ entries, called as anybody can call them: what does not fit is refused, not read out of
bounds."""

import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())
KEY = jax.random.key(0)


def draw(*shape: int, dtype=jnp.float32):
  return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape, dtype)


def call(target: str, results: list[tuple[int, ...]], arrays, parts: int = 1) -> list[jax.Array]:
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
  out = jax.ffi.ffi_call(target, shapes)(*arrays, parts=np.int64(parts), scale=np.float32(1))
  return jax.block_until_ready(out)


def refused():
  return pytest.raises(jax.errors.JaxRuntimeError, match='INVALID_ARGUMENT')


CAUSAL = {'queries': (2, 5, 4, 8), 'keys': (2, 5, 2, 8), 'values': (2, 5, 2, 6)}
SUMS = {'output': (2, 5, 4, 6), 'log sums': (2, 4, 5)}
GRADIENTS = [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)]
SPOILT_CAUSAL = {
  'bfloat16 queries': ('queries', lambda x: x.astype(jnp.bfloat16)),
  'integer keys': ('keys', lambda x: x.astype(jnp.int32)),
  'keys of three axes': ('keys', lambda x: x[0]),
  'keys of another batch': ('keys', lambda x: x[:1]),
  'shorter keys': ('keys', lambda x: x[:, :3]),
  'keys of other dims': ('keys', lambda x: x[..., :4]),
  'values of another length': ('values', lambda x: x[:, :4]),
  'heads that the queries do not share evenly': ('queries', lambda x: x[:, :, :3]),
  'two key heads beside four of the values': ('values', lambda x: jnp.tile(x, (1, 1, 2, 1))),
  'no tokens': ('queries', lambda x: x[:, :0]),
  'an array less': ('values', None),
}


def spoilt(arrays: dict[str, jax.Array], name: str, spoil) -> list[jax.Array]:
  changed = {} if spoil is None else {name: spoil(arrays[name])}
  kept = {key: array for key, array in arrays.items() if spoil is not None or key != name}
  return list({**kept, **changed}.values())


@pytest.mark.parametrize(('name', 'spoil'), SPOILT_CAUSAL.values(), ids=SPOILT_CAUSAL)
def test_causal_attention_refuses_what_does_not_fit(name, spoil):
  arrays = {key: draw(*shape) for key, shape in CAUSAL.items()}
  call('mla_causal_forward', [*SUMS.values()], arrays.values())  # as they are, they fit
  with refused():
    call('mla_causal_forward', [*SUMS.values()], spoilt(arrays, name, spoil))


SPOILT_GRADIENT = {
  'output of other dims': ('output', lambda x: x[..., :5]),
  'float16 output': ('output', lambda x: x.astype(jnp.float16)),
  'log sums of fewer heads': ('log sums', lambda x: x[:, :2]),
  'log sums of two axes': ('log sums', lambda x: x[0]),
  'a shorter gradient': ('gradient', lambda x: x[:, :4]),
  'no gradient': ('gradient', None),
  'keys of other dims': ('keys', lambda x: x[..., :4]),
}


@pytest.mark.parametrize(('name', 'spoil'), SPOILT_GRADIENT.values(), ids=SPOILT_GRADIENT)
def test_its_gradient_refuses_what_does_not_fit(name, spoil):
  shapes = {**CAUSAL, **SUMS, 'gradient': SUMS['output']}
  arrays = {key: draw(*shape) for key, shape in shapes.items()}
  call('mla_causal_backward', GRADIENTS, arrays.values())
  with refused():
    call('mla_causal_backward', GRADIENTS, spoilt(arrays, name, spoil))


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
  'float positions': ('positions', lambda x: x.astype(jnp.float32)),
  'int64 positions': ('positions', lambda x: x.astype(jnp.int64)),
  'positions of one row': ('positions', lambda x: x[:1]),
  'float16 keys': ('keys', lambda x: x.astype(jnp.float16)),
  'int8 without scales': ('keys', lambda x: x.astype(jnp.int8)),
  'fewer slots of values': ('values', lambda x: x[:, :11]),
  'three heads in all': ('keys', lambda x: x[:3]),
  'more key heads than of the values': ('values', lambda x: x[:2]),
  'other dims': ('keys', lambda x: x[..., :7]),
  'half-precision queries': ('queries', lambda x: x.astype(jnp.bfloat16)),
  'an array less': ('positions', None),
}


@pytest.mark.parametrize(('name', 'spoil'), SPOILT_CACHED.values(), ids=SPOILT_CACHED)
def test_cached_attention_refuses_what_does_not_fit(name, spoil):
  out = [(2, 1, 4, 6)]
  arrays = cached_arrays()
  call('mla_cached_forward', out, arrays.values())
  with jax.enable_x64(True), refused():
    call('mla_cached_forward', out, spoilt(arrays, name, spoil))


@pytest.mark.parametrize('starts', [jnp.zeros((2, 5)), jnp.zeros((2, 4), int), jnp.zeros(10, int)])
def test_starts_that_do_not_fit_are_refused(starts):
  causal = [draw(*shape) for shape in CAUSAL.values()]
  gradient = [*causal, *(draw(*s) for s in (*SUMS.values(), SUMS['output']))]
  cached = [*cached_arrays().values()]
  fit = jnp.zeros((2, 5), jnp.int32)
  call('mla_causal_forward', [*SUMS.values()], [*causal, fit])
  call('mla_causal_backward', GRADIENTS, [*gradient, fit])
  call('mla_cached_forward', [(2, 1, 4, 6)], [*cached, fit[:, :1]])
  starts = starts if starts.dtype == jnp.float32 else starts.astype(jnp.int32)
  for target, results, arrays in (
    ('mla_causal_forward', [*SUMS.values()], causal),
    ('mla_causal_backward', GRADIENTS, gradient),
    ('mla_cached_forward', [(2, 1, 4, 6)], cached),
  ):
    with refused():
      call(target, results, [*arrays, starts])
    with refused():
      call(target, results, [*arrays, fit, fit])


@pytest.mark.parametrize('scales', [(4, 11), (2, 12), (48,)])
def test_int8_keys_need_a_scale_a_vector(scales):
  arrays = cached_arrays()
  arrays['keys'] = jnp.ones((4, 12, 8), jnp.int8)
  with refused():
    call('mla_cached_forward', [(2, 1, 4, 6)], {**arrays, 'key scales': jnp.ones(scales)}.values())
  call('mla_cached_forward', [(2, 1, 4, 6)], {**arrays, 'key scales': jnp.ones((4, 12))}.values())


@pytest.mark.parametrize('parts', [0, -1, 2, 2**62])
def test_a_number_of_parts_that_is_not_theirs_is_refused(parts):
  arrays = [draw(*shape) for shape in CAUSAL.values()]
  with refused():
    call('mla_causal_forward', [*SUMS.values()], arrays, parts)
  with refused():
    call('mla_cached_forward', [(2, 1, 4, 6)], cached_arrays().values(), parts)


@pytest.mark.parametrize('shape', [(2, 5, 4, 7), (2, 4, 4, 6), (2, 5, 24)])
def test_a_result_of_other_sizes_is_refused(shape):
  arrays = [draw(*shape) for shape in CAUSAL.values()]
  with refused():
    call('mla_causal_forward', [shape, SUMS['log sums']], arrays)
  with refused():
    call(
      'mla_causal_backward',
      [(2, 5, 4, 8), shape, (2, 5, 2, 6)],
      [*arrays, *(draw(*s) for s in (*SUMS.values(), SUMS['output']))],
    )
  with refused():
    call('mla_cached_forward', [shape], cached_arrays().values())


@pytest.mark.parametrize(
  ('new', 'starts', 'axis'),
  [
    (draw(2, 13, 4), jnp.zeros(2, jnp.int32), 1),  # more slots than there are
    (draw(2, 3, 5), jnp.zeros(2, jnp.int32), 1),
    (draw(2, 3, 4).astype(jnp.bfloat16), jnp.zeros(2, jnp.int32), 1),
    (draw(2, 3, 4), jnp.zeros(1, jnp.int32), 1),
    (draw(2, 3, 4), jnp.zeros(2, jnp.float32), 1),
    (draw(2, 3, 4), jnp.zeros(2, jnp.int32), 7),
    (draw(2, 3, 4), jnp.zeros(2, jnp.int32), 0),
    (draw(2, 3, 4), jnp.zeros(2, jnp.int32), -1),
    (draw(2, 12), jnp.zeros(2, jnp.int32), 1),
  ],
)
def test_append_refuses_what_does_not_fit(new, starts, axis):
  into = draw(2, 12, 4)
  write = jax.ffi.ffi_call('mla_append', jax.ShapeDtypeStruct(into.shape, into.dtype))
  with refused():
    jax.block_until_ready(write(into, new, starts, axis=np.int64(axis)))


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_too_little_memory_is_the_calls_error():
  """It ended the process, without a word."""
  shape, out = (1, 2048, 1, 8192), [(1, 2048, 1, 16), (1, 1, 2048)]
  arrays = [jnp.ones(shape), jnp.ones(shape), jnp.ones(out[0])]
  results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in out]
  attend = jax.ffi.ffi_call('mla_causal_forward', results)
  compiled = jax.jit(lambda *xs: attend(*xs, parts=np.int64(1), scale=np.float32(1)))
  compiled = compiled.lower(*arrays).compile()
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25, before[1]))
  try:
    with pytest.raises(jax.errors.JaxRuntimeError, match='too little memory'):  # its keys: 64 MB
      jax.block_until_ready(compiled(*arrays))
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)
