"""A user's own JAX flags change no figure: dtypes, promotions and random draws are all explicit."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHORT_RUN, tiny_config

from mla import evaluate, metrics
from mla import model as model_lib
from mla.train import train_and_evaluate

FLAGS = {
  'JAX_ENABLE_X64': lambda: jax.enable_x64(True),
  'JAX_NUMPY_RANK_PROMOTION=raise': lambda: jax.numpy_rank_promotion('raise'),
  'JAX_NUMPY_DTYPE_PROMOTION=strict': lambda: jax.numpy_dtype_promotion('strict'),
  'JAX_DEFAULT_PRNG_IMPL=rbg': lambda: jax.default_prng_impl('rbg'),
}
UNSAFE = {'JAX_DEFAULT_PRNG_IMPL=unsafe_rbg': lambda: jax.default_prng_impl('unsafe_rbg')}


def config_of(text: Path):
  config = tiny_config('mla')
  config.update_from_flattened_dict({**SHORT_RUN, 'num_steps': 4, 'data.files': str(text)})
  return config


def figures_of(text: Path, folder: Path) -> list[float]:
  """Each step's loss, each evaluation's, and the perplexity read through each kind of cache."""
  train_and_evaluate(config_of(text), folder)
  lines = metrics.read(folder / 'metrics.jsonl')
  found = [line[name] for line in lines for name in ('loss', 'eval_loss') if name in line]
  for dtype in ('float32', 'bfloat16', 'int8'):
    found.append(evaluate.score_run(folder, dtype, max_tokens=64)[0]['perplexity'])
  return found


@pytest.fixture(scope='module')
def usual(text, tmp_path_factory) -> list[float]:
  return figures_of(text, tmp_path_factory.mktemp('usual') / 'run')


@pytest.mark.parametrize('flag', FLAGS)
def test_training_and_evaluation_are_the_same(flag, usual, text, tmp_path):
  with FLAGS[flag]():
    found = figures_of(text, tmp_path / 'run')
  np.testing.assert_allclose(found, usual, rtol=1e-6)


def test_a_run_goes_on_under_another_flag(usual, text, tmp_path):
  """The random key that is saved is of one implementation, whatever the default is."""
  import mla.train

  class Killed(BaseException):
    pass

  def kill(step, evaluation):
    raise Killed

  with contextlib.suppress(Killed):
    mla.train.train_and_evaluate(config_of(text), tmp_path / 'run', report=kill)
  with jax.default_prng_impl('rbg'), jax.enable_x64(True):
    assert train_and_evaluate(config_of(text), tmp_path / 'run')
  lines = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  losses = [line['loss'] for line in lines if 'loss' in line]
  assert len(losses) == 4
  np.testing.assert_allclose(losses[-1], usual[-5], rtol=1e-6)


@pytest.mark.parametrize('flag', FLAGS | UNSAFE)
def test_generation_writes_the_same(flag):
  def written() -> np.ndarray:
    model = model_lib.make_model(tiny_config('gqa', num_layers=1), 11)
    cache = model_lib.allocate_cache(model, batch=2, slots=12, dtype='float32')
    prompts, lengths = jnp.ones((2, 4), jnp.int32), jnp.array([4, 2], jnp.int32)
    key = jax.random.key(3, impl=model_lib.PRNG)
    tokens, _ = model_lib.generate(
      model, cache, prompts, lengths, key, steps=8, temperature=0.9, top_p=0.9
    )
    return np.asarray(tokens)

  expected = written()
  with (FLAGS | UNSAFE)[flag]():
    np.testing.assert_array_equal(written(), expected)
