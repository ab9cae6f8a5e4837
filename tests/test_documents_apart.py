"""data.packing=documents: a document in a window is what it is alone, in every variant.

The oracle is each document by itself; that one knows nothing of packing.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHORT_RUN, mesh_of, tiny_config
from flax import nnx

from mla import evaluate, metrics, sharding
from mla import step as step_lib
from mla.data.pipeline import load_data
from mla.errors import UserError
from mla.model import Decoder, allocate_cache, decode, forward, make_model
from mla.optimizer import make_optimizer
from mla.train import train_and_evaluate
from mla.workdir import read_config

VOCAB = 61
# Of each row: one document that began before it, short ones, one of a single token, one that goes
# on behind it; blocks of 64 tokens end within documents, and one lies within.
LENGTHS = [[70, 1, 9, 60], [3, 137], [140]]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 140)).astype(np.int32)
STARTS = np.stack([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in LENGTHS]).astype(np.int32)
jit_forward, jit_decode = jax.jit(forward), jax.jit(decode)


@functools.cache
def model_of(arm: str) -> Decoder:
  return make_model(tiny_config(arm), VOCAB)


def alone(model: Decoder, tokens: np.ndarray) -> np.ndarray:
  """Logits of each row's documents, each run by itself."""
  return np.stack([
    np.concatenate([
      # What follows a document is nothing to it: one shape, one compilation.
      jit_forward(model, jnp.pad(jnp.asarray(part), (0, 140 - len(part)))[None])[0, : len(part)]
      for part in np.split(row, np.cumsum(lengths)[:-1])
    ])
    for row, lengths in zip(tokens, LENGTHS, strict=True)
  ])  # fmt: skip


def test_logits_are_those_of_each_document_alone(arm):
  model = model_of(arm)
  expected = alone(model, TOKENS)
  np.testing.assert_allclose(jit_forward(model, TOKENS, STARTS), expected, atol=1e-5)
  assert np.abs(jit_forward(model, TOKENS)[0, 70:] - expected[0, 70:]).max() > 1e-2


def test_through_a_cache_too(arm):
  model = model_of(arm)
  cache = allocate_cache(model, batch=3, slots=140, dtype='float32')
  logits = []
  chunk = 64
  for at in range(0, 140, chunk):
    part, cache = jit_decode(model, cache, TOKENS[:, at : at + chunk], STARTS[:, at : at + chunk])
    logits.append(part)
  np.testing.assert_allclose(np.concatenate(logits, 1), alone(model, TOKENS), atol=1e-5)


@pytest.mark.parametrize('arm', ['gqa', 'mla', 'mla_nested'])
def test_gradients_are_those_of_each_document_alone(arm):
  graphdef, params = nnx.split(model_of(arm))
  weights = np.random.default_rng(1).standard_normal((140, VOCAB)).astype(np.float32) / 140

  def of(tokens, starts, weights):
    def total(params):
      return jnp.sum(forward(nnx.merge(graphdef, params), tokens, starts)[0] * weights)

    return jax.tree.leaves(jax.grad(total)(params))

  of = jax.jit(of)
  packed = of(TOKENS[:1], STARTS[:1], weights)
  parts = []
  for at, length in zip(np.cumsum([0, *LENGTHS[0][:-1]]), LENGTHS[0], strict=True):
    own = slice(at, at + length)
    fill = ((0, 140 - length), (0, 0))
    tokens = np.pad(TOKENS[0, own], fill[0])[None]
    parts.append(of(tokens, None, np.pad(weights[own], fill)))
  for whole, *its in zip(packed, *parts, strict=True):
    np.testing.assert_allclose(whole, sum(its), atol=1e-5)


def losses(arm: str, shape: tuple[int, int, int], **changes) -> np.ndarray:
  """Two training steps' losses and gradient norms on packed windows, on a mesh of this shape."""
  config = tiny_config(arm, seq_len=139, num_layers=1, data__packing='documents', **changes)
  tokens, starts = (np.tile(rows, (4, 1))[:8] for rows in (TOKENS, STARTS[:, :-1]))
  mesh = mesh_of(shape)
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    create = functools.partial(step_lib.init_state, config, VOCAB, optimizer)
    placement = sharding.shardings(jax.eval_shape(create), mesh)
    state = jax.jit(create, out_shardings=placement)()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, VOCAB)))
    step = step_lib.jit_step(config, graphdef, optimizer, placement)
    figures = []
    for _ in range(2):
      state, measured = step(state, *sharding.put_batches((tokens, starts), mesh))
      figures.append([float(measured['loss']), float(measured['grad_norm'])])
  return np.array(figures)


def test_a_mesh_gives_the_losses_of_one_device():
  on_a_mesh = losses('gqa', (2, 2, 2), accumulation_steps=2)
  np.testing.assert_allclose(on_a_mesh, losses('gqa', (1, 1, 1)), rtol=1e-5)


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """Two hundred short documents; every tenth is held out."""
  path = tmp_path_factory.mktemp('text') / 'records.jsonl'
  texts = (f'{n} bottles of {"beer" * (n % 3)} on the wall' for n in range(200))
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return path


@pytest.fixture(scope='module')
def trained(records, tmp_path_factory):
  config = tiny_config('mla', data__files=str(records), data__packing='documents')
  config.update_from_flattened_dict({**SHORT_RUN, 'seq_len': 48, 'learning_rate': 1e-2})
  workdir = tmp_path_factory.mktemp('runs') / 'packed'
  assert train_and_evaluate(config, workdir)
  return workdir


def by_hand(workdir) -> tuple[np.ndarray, list[int], int]:
  """NLL of every target of the validation text, how many tokens it sees, and the text's bytes.

  From evaluate.py's protocol alone: the stream is cut at its BOS, and each part of a document runs
  by itself, without a cache.
  """
  config = read_config(workdir)
  data = load_data(config)
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  model, _ = evaluate.load_model(workdir, config, 257, data.digest, mesh)
  stream, length = data.validation.tokens.astype(np.int32), config.seq_len
  nll, seen = [], []
  for start in range(0, len(stream) - 1, length):
    window = stream[start : start + length + 1]
    cuts = np.unique([0, *np.flatnonzero(window[:-1] == 256)])
    for first, last in zip(cuts, [*cuts[1:], len(window) - 1], strict=True):
      inputs = np.zeros(length, np.int32)
      inputs[: last - first] = window[first:last]
      logits = np.asarray(jax.nn.log_softmax(jit_forward(model, inputs[None])))[0]
      targets = window[first + 1 : last + 1]
      nll += [-logits[i, target] for i, target in enumerate(targets)]
      seen += range(1, len(targets) + 1)
  return np.array(nll, np.float64), seen, int(np.sum(stream[1:] != 256))


def test_a_second_reading_of_the_protocol_agrees(trained):
  nll, seen, text_bytes = by_hand(trained)
  read = evaluate.evaluate_run(trained, 'float32')
  assert read['tokens_evaluated'] == len(nll)
  assert math.log(read['perplexity']) == pytest.approx(nll.mean(), abs=1e-5)
  assert read['bits_per_byte'] == pytest.approx(nll.sum() / (math.log(2) * text_bytes), rel=1e-5)
  for part in read['loss_by_position']:
    its = [x for x, n in zip(nll, seen, strict=True) if part['from'] <= n <= part['to']]
    assert part['targets'] == len(its) and part['loss'] == pytest.approx(np.mean(its), abs=1e-5)
  assert sum(part['targets'] for part in read['loss_by_position']) == len(nll)


def test_training_evaluates_by_the_same_rule(trained):
  logged = [line for line in metrics.read(trained / 'metrics.jsonl') if 'eval_loss' in line][-1]
  config = read_config(trained)
  figures, _ = evaluate.score_run(trained, 'float32', max_tokens=config.data.eval_tokens)
  assert logged['eval_loss'] == pytest.approx(math.log(figures['perplexity']), abs=1e-5)
  assert logged['eval_bits_per_byte'] == pytest.approx(figures['bits_per_byte'], abs=1e-5)


def test_a_run_is_not_gone_on_with_otherwise(trained):
  config = read_config(trained)
  config.data.packing = ''
  with pytest.raises(UserError, match='data.packing=: .* a run with data.packing=documents'):
    train_and_evaluate(config, trained)
