"""What every attention variant must satisfy, whatever it keeps in its cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ARMS, arrays_in, mesh_of, tiny_config
from flax import nnx

from mla import cache as cache_lib
from mla import model as model_lib
from mla import sharding
from mla import step as step_lib
from mla.attention import VARIANTS, append, make_attention
from mla.model import allocate_cache, decode, forward, generate, make_model, prefill
from mla.optimizer import make_optimizer

VOCAB = 61
LATENT_ARMS = [
  arm for arm, fields in ARMS.items() if 'latent_dim' in VARIANTS[fields['attention']].fields
]
KEY = jax.random.key(7)


@functools.cache
def model_of(arm: str, **changes) -> model_lib.Decoder:
  return make_model(tiny_config(arm, **changes), VOCAB)


def tokens_of(batch: int, length: int) -> jax.Array:
  return jax.random.randint(KEY, (batch, length), 0, VOCAB)


jit_forward = jax.jit(forward)
jit_decode = jax.jit(decode)


def attention_of(arm: str):
  return make_attention(tiny_config(arm), nnx.Rngs(params=3))


def test_causality_by_gradients(arm):
  attention = attention_of(arm)
  x = jax.random.normal(KEY, (1, 70, 32))  # more than one block of queries
  positions = jnp.arange(70)[None]

  def outputs(x):
    return attention.attend(x, attention.compress(x, positions), positions)[0].sum(-1)

  influence = np.abs(jax.jit(jax.jacrev(outputs))(x)[:, 0]).sum(-1)  # [T out, T in]
  assert np.all(influence[np.triu_indices(70, 1)] == 0), 'a token sees a later one'
  assert np.all(influence[np.tril_indices(70)] > 0), 'a token does not see an earlier one'


def test_a_later_token_changes_no_earlier_logits(arm):
  tokens = tokens_of(1, 20)
  changed = tokens.at[0, 12].add(1) % VOCAB
  before, after = (jit_forward(model_of(arm), t) for t in (tokens, changed))
  np.testing.assert_array_equal(before[:, :12], after[:, :12])
  assert np.all(np.abs(before - after)[0, 12:].max(-1) > 0)


@pytest.mark.parametrize('chunks', [(1,) * 21, (20, 1), (7, 7, 7), (1, 13, 2, 5)])
def test_decoding_in_chunks_is_the_parallel_forward(arm, chunks):
  tokens = tokens_of(2, 21)
  cache = allocate_cache(model_of(arm), batch=2, slots=24, dtype='float32')
  logits, done = [], 0
  for size in chunks:
    part, cache = jit_decode(model_of(arm), cache, tokens[:, done : done + size])
    logits.append(part)
    done += size
  expected = jit_forward(model_of(arm), tokens)
  np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=2e-5)
  np.testing.assert_array_equal(cache.lengths, [21, 21])


def test_ragged_prompts_in_one_batch(arm):
  lengths = [3, 9, 6]
  tokens = tokens_of(3, 14)
  cache = allocate_cache(model_of(arm), batch=3, slots=16, dtype='float32')
  prompts = jnp.where(jnp.arange(9) < jnp.array(lengths)[:, None], tokens[:, :9], 0)
  logits, cache = jax.jit(prefill)(model_of(arm), cache, prompts, jnp.array(lengths))
  following = jnp.stack([tokens[row, n : n + 4] for row, n in enumerate(lengths)])
  decoded, _ = jit_decode(model_of(arm), cache, following)
  for row, n in enumerate(lengths):
    expected = jit_forward(model_of(arm), tokens[row : row + 1, : n + 4])[0]
    np.testing.assert_allclose(logits[row], expected[n - 1], atol=2e-5)
    np.testing.assert_allclose(decoded[row], expected[n:], atol=2e-5)


@pytest.mark.parametrize(('dtype', 'bound'), [('float32', 1e-4), ('bfloat16', 5e-3)])
def test_cached_loss_is_near_the_parallel_one(arm, dtype, bound):
  tokens = tokens_of(8, 33)
  cache = allocate_cache(model_of(arm), batch=8, slots=32, dtype=dtype)
  cached, _ = jit_decode(model_of(arm), cache, tokens[:, :-1])
  parallel = jit_forward(model_of(arm), tokens[:, :-1])

  def loss(logits):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    return -float(picked.mean())

  assert abs(loss(cached) - loss(parallel)) < bound


def test_int8_cache_stays_close(arm):
  tokens = tokens_of(4, 32)
  cache = allocate_cache(model_of(arm), batch=4, slots=32, dtype='int8')
  cached, _ = jit_decode(model_of(arm), cache, tokens)
  exact = jit_forward(model_of(arm), tokens)
  error = float(jnp.abs(cached - exact).max() / jnp.std(exact))
  assert 0 < error < 0.1  # 0 would mean that nothing was quantised


@pytest.mark.parametrize(('dtype', 'size'), [('float32', 4), ('bfloat16', 2), ('int8', 1)])
def test_measured_bytes_are_the_papers_formula(arm, dtype, size):
  cache = allocate_cache(model_of(arm), batch=3, slots=40, dtype=dtype)
  vectors = VARIANTS[ARMS[arm]['attention']].vectors(tiny_config(arm))
  scales = 4 * len(vectors) if dtype == 'int8' else 0
  expected = 2 * (sum(vectors) * size + scales)  # two layers
  assert cache.bytes_per_token() == expected
  # What decoding leaves behind is what was allocated: nothing larger is kept on the side.
  _, after = jit_decode(model_of(arm), cache, tokens_of(3, 5))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(after.layers)) == expected * 3 * 40


@pytest.mark.parametrize('dtype', cache_lib.DTYPES)
def test_a_decode_step_never_expands_the_latents(dtype):
  slots, heads, nope = 512, 4, 6

  def largest(arm):
    model = model_of(arm)
    cache = allocate_cache(model, batch=1, slots=slots, dtype=dtype)
    program = jax.make_jaxpr(lambda cache, token: decode(model, cache, token))
    return max(x.size for x in arrays_in(program(cache, jnp.zeros((1, 1), jnp.int32)).jaxpr))

  for arm in LATENT_ARMS:
    assert largest(arm) < slots * heads * nope
  assert largest('mha') >= slots * heads * nope  # the count does see such arrays


@pytest.mark.parametrize('arm', LATENT_ARMS)
def test_absorbed_is_expanded(arm):
  attention = attention_of(arm)
  x = jax.random.normal(KEY, (2, 17, 32))
  positions = jnp.broadcast_to(jnp.arange(17), (2, 17))
  entries = attention.compress(x, positions)
  shapes = attention.cache_shapes()
  (layer,) = cache_lib.allocate([shapes], batch=2, slots=17, dtype='float32').layers
  layer = append(layer, entries, jnp.zeros(2, jnp.int32))
  absorbed = attention.attend_cached(x, layer, positions)
  expanded = attention.attend(x, entries, positions)
  np.testing.assert_allclose(absorbed, expanded, atol=1e-5)


def test_greedy_generation_is_the_argmax_of_forward(arm):
  lengths = jnp.array([4, 7])
  prompts = tokens_of(2, 7)
  cache = allocate_cache(model_of(arm), batch=2, slots=12, dtype='float32')
  model = model_of(arm)
  got, cache = generate(model, cache, prompts, lengths, KEY, steps=5, temperature=0.0)
  for row, n in enumerate([4, 7]):
    text = prompts[row : row + 1, :n]
    for _ in range(5):
      padded = jnp.pad(text, ((0, 0), (0, 12 - text.shape[1])))  # one shape, one compilation
      following = jit_forward(model, padded)[:, text.shape[1] - 1].argmax(-1)
      text = jnp.concatenate([text, following[:, None]], axis=1)
    np.testing.assert_array_equal(got[row], text[0, n:])


# An arm a variant, the one with most to it.
EACH_VARIANT = pytest.mark.parametrize(
  'arm', {fields['attention']: arm for arm, fields in ARMS.items()}.values()
)


@functools.cache
def initial_state(arm: str, heads: int) -> step_lib.TrainState:
  config = tiny_config(arm, num_heads=heads)
  return jax.jit(lambda: step_lib.init_state(config, 64, make_optimizer(config)))()


@functools.cache
def losses(arm: str, shape: tuple[int, int, int] = (1, 1, 1), **changes) -> np.ndarray:
  """Three training steps' losses and gradient norms on a mesh of this shape."""
  config = tiny_config(arm, **changes)
  mesh = mesh_of(shape)
  with jax.set_mesh(mesh):
    state = initial_state(arm, config.num_heads)
    placement = sharding.shardings(jax.eval_shape(lambda: state), mesh)
    state = jax.device_put(state, placement)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, 64)))
    step = functools.partial(step_lib.train_step, config, graphdef, make_optimizer(config))
    step = jax.jit(step, out_shardings=(placement, None))
    figures = []
    for index in range(3):
      tokens = jax.random.randint(jax.random.key(index), (8, 33), 0, VOCAB)
      state, measured = step(state, sharding.put_batch(np.asarray(tokens), mesh))
      figures.append([float(measured['loss']), float(measured['grad_norm'])])
  return np.array(figures)


@EACH_VARIANT
@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_meshes_give_the_losses_of_one_device(arm, shape):
  """Along tensor the heads are split; gqa has two key heads for them, mqa one."""
  heads = max(4, shape[2])
  np.testing.assert_allclose(
    losses(arm, shape, num_heads=heads), losses(arm, num_heads=heads), rtol=1e-5
  )


@EACH_VARIANT
def test_weights_do_lie_on_the_mesh(arm):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  state = nnx.state(nnx.eval_shape(lambda: make_model(tiny_config(arm), 64)))
  placed = sharding.shardings(state, mesh)
  (output,) = jax.tree.leaves(placed['blocks']['attention']['w_o'])
  assert output.spec == jax.sharding.PartitionSpec(None, ('tensor',), None, ('fsdp',))


@EACH_VARIANT
@pytest.mark.parametrize('remat', ['latents', 'block', 'full'])
def test_remat_changes_no_losses(arm, remat):
  np.testing.assert_allclose(losses(arm, remat=remat), losses(arm, num_heads=4), rtol=1e-6)


@EACH_VARIANT
def test_accumulated_gradients_are_those_of_the_whole_batch(arm):
  accumulated = losses(arm, (2, 2, 2), accumulation_steps=2)
  np.testing.assert_allclose(accumulated, losses(arm, num_heads=4), rtol=1e-5)


@pytest.mark.parametrize('shape', [(4, 1, 1), (2, 2, 1)])
def test_accumulated_gradients_that_are_exchanged_once_are_too(shape):
  accumulated = losses('mla', shape, accumulation_steps=2)
  np.testing.assert_allclose(accumulated, losses('mla'), rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(arm):
  model = model_of(arm, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  exact = jit_forward(model_of(arm), tokens_of(2, 32))
  rough = jit_forward(model, tokens_of(2, 32))
  error = float(jnp.abs(rough - exact).max() / jnp.std(exact))
  assert rough.dtype == jnp.float32
  assert 1e-4 < error < 0.2
