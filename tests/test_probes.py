"""Probes: their windows against solvers that read nothing else; and the way through everything."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, tiny_config
from flax import nnx

from mla import config as config_lib
from mla import evaluate, generate, inside, probes, step
from mla.data.pipeline import eval_windows, load_data, skip_to, train_batches, window_shape
from mla.errors import UserError
from mla.model import forward, make_model
from mla.optimizer import make_optimizer
from mla.train import train_and_evaluate

SIZES = {  # records, attributes, alphabet, T
  'payload': (5, 3, 7, 24),
  'multikey': (5, 3, 7, 24),
  'copy': (12, 1, 7, 24),
  'mqar': (5, 1, 7, 24),
}


def probe_config(name: str, arm: str = 'mla', **changes):
  records, attributes, alphabet, length = SIZES[name]
  sizes = {'data__records': records, 'data__attributes': attributes, 'data__alphabet': alphabet}
  more = {**sizes, 'seq_len': length, 'data__dataset': f'probe:{name}', **changes}
  return tiny_config(arm, **more)


@pytest.fixture(params=SIZES)
def name(request) -> str:
  return request.param


def stream(name: str, held_out: bool = False) -> probes.Stream:
  return probes.Stream(probes.PROBES[name](*SIZES[name]), held_out)


def solve(name: str, window: np.ndarray) -> dict[int, tuple[int, int]]:
  """{position: (the record's, its answer)} by what stands before it and the docstrings' tokens."""
  R, _, _, _ = SIZES[name]
  read = window[:, :-1].tolist()
  found = {}
  for t in np.flatnonzero(window[:, -1] >= 0):
    if name == 'payload':  # a key, then m values in their order; 2 R keys stand before what asks
      place = [row[0] for row in read[:R]].index(read[t][0])
      found[t] = place, read[place][1 + read[t][1] - 2 * R]
    elif name == 'multikey':
      (place,) = (place for place in range(R) if read[t][0] in read[place])
      found[t] = place, read[place][read[t][1]]
    elif name == 'copy':
      found[t] = t - R, read[t - R][0]
    else:
      place = read[: 2 * R : 2].index(read[t])
      found[t] = place, read[2 * place + 1][0]
  return found


def test_windows_can_be_solved_and_not_be_guessed(name):
  R, m, A, T = SIZES[name]
  probe = stream(name).probe
  first_value = {'payload': 2 * R + m, 'multikey': m, 'copy': 0, 'mqar': 2 * R}[name]
  right, guessed, common, queries, met = 0, 0, 0, 0, np.zeros(R)
  rng = np.random.default_rng(0)
  for index in range(200):
    window = stream(name).window(index, seed=3)
    assert window.shape == (T, probe.parts + 1) and window.dtype == np.int32
    assert window.min() >= -1 and window.max() < probe.vocab
    assert (window[:, 0] >= 0).all()  # every position reads something
    answers = solve(name, window)
    assert len(answers) == probe.queries
    targets = window[list(answers), -1]
    right += sum(window[t, -1] == answer for t, (_, answer) in answers.items())
    for place, _ in answers.values():
      met[place] += 1
    # Who knows which attribute is asked, and so the A tokens that it may be, but not the record.
    lowest = (targets - first_value) // A * A + first_value
    guessed += np.sum(lowest + rng.integers(A, size=len(targets)) == targets)
    common += np.sum(lowest == targets)
    queries += len(targets)
  assert right == queries
  assert (met > 0.8 * queries / R).all()  # no record is left out
  spread = 4 * math.sqrt(queries / A * T / R)  # a record may be asked more than once
  assert abs(guessed - queries / A) < spread and abs(common - queries / A) < spread


def test_a_window_is_its_seed_and_number(name):
  one, again = (stream(name).window(5, seed=1) for _ in range(2))
  np.testing.assert_array_equal(one, again)
  others = [stream(name).window(6, 1), stream(name).window(5, 2), stream(name, True).window(5, 1)]
  assert all((one != other).any() for other in others)
  held_out = [stream(name, True).window(7, seed) for seed in (0, 1)]  # the same whatever the seed
  np.testing.assert_array_equal(*held_out)


def test_rows_and_position_are_what_they_are_for_text(name):
  """Each process takes its rows; a position is the number of batches taken."""
  given = {'seq_len': SIZES[name][3], 'batch_size': 4, 'seed': 9}
  whole = train_batches(stream(name), **given)
  first, second, third = (next(whole).tokens for _ in range(3))
  halves = [train_batches(stream(name), **given, rows=np.array(rows)) for rows in ([0, 1], [2, 3])]
  np.testing.assert_array_equal(first, np.concatenate([next(half).tokens for half in halves]))
  later = train_batches(stream(name), **given)
  skip_to(later, 2)
  np.testing.assert_array_equal(next(later).tokens, third)
  assert third.shape == (4, *window_shape(probe_config(name)))
  assert (first != second).any() and whole.get_state() == {'next_index': 3}


def test_held_out_windows_are_the_first_ones(name):
  few = eval_windows(stream(name, True), seq_len=24, max_tokens=10 * stream(name).probe.queries)
  assert len(few.tokens) == 10
  for index, window in enumerate(few.tokens):
    np.testing.assert_array_equal(window, stream(name, True).window(index))
  assert few.mask.sum() == 10 * stream(name).probe.queries
  np.testing.assert_array_equal(few.mask, few.tokens[..., -1] >= 0)


def test_bits_recalled():
  probe = probes.Payload(10, 3, 8, 30)
  assert probe.bits_recalled(1.0) == probe.bits_held() == 10 * 3 * 3
  assert probe.bits_recalled(1 / 8) == probe.bits_recalled(0.01) == 0
  # Mutual information of a value and an answer that is right with chance 0.6, summed out.
  right, wrong = 0.6, 0.4 / 7
  both = np.full((8, 8), wrong / 8) + np.eye(8) * (right - wrong) / 8
  information = np.sum(both * np.log2(both * 8 * 8))
  assert probe.bits_recalled(0.6) == pytest.approx(30 * information)


def test_values_that_are_not_drawn_twice_hold_fewer_bits():
  """All sets of two records of two values in four, counted, for no query asks which stood first;
  and guessing is between two."""
  probe = probes.MultiKey(2, 2, 4, 8)
  windows = (probe.draw(np.random.default_rng(n))[:2, :2] for n in range(2000))
  drawn = {frozenset(map(tuple, window)) for window in windows}
  assert probe.bits_held() == pytest.approx(math.log2(len(drawn)))
  assert probe.bits_recalled(1.0) == probe.bits_held() and probe.bits_recalled(0.5) == 0


def batch_of(config, rows: int = 8) -> np.ndarray:
  return next(train_batches(load_data(config).train, seq_len=0, batch_size=rows, seed=0)).tokens


def test_a_position_reads_the_sum_of_its_tokens():
  config = probe_config('payload')
  model = make_model(config, probes.parse(config).vocab)
  tokens = batch_of(config)[..., :-1]
  table = np.asarray(model.embedding[...])
  expected = sum(
    np.where(tokens[..., part, None] >= 0, table[tokens[..., part]], 0) for part in range(4)
  )
  np.testing.assert_allclose(model.embed(jnp.asarray(tokens)), expected, rtol=1e-6, atol=1e-6)
  on_mesh = jax.jit(lambda model, tokens: model.embed(tokens))
  with jax.set_mesh(mesh_of((2, 2, 2))):  # where the table is divided
    np.testing.assert_allclose(on_mesh(model, tokens), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_is_scored():
  """Loss and gradient against optax on the queries alone; in two micro-batches the same."""
  config = probe_config('payload', batch_size=8)
  model = make_model(config, probes.parse(config).vocab)
  graphdef, params = nnx.split(model)
  batch = batch_of(config)
  windows, real = jnp.asarray(batch), np.nonzero(batch[..., -1] >= 0)

  def by_hand(params):
    logits = forward(nnx.merge(graphdef, params), windows[..., :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[real], batch[..., -1][real])
    return jnp.mean(losses)

  expected, slope = jax.jit(jax.value_and_grad(by_hand))(params)

  def ours(params):
    return step.mean_nll(nnx.merge(graphdef, params), windows)

  found, gradient = jax.jit(jax.value_and_grad(ours))(params)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for one, other in zip(*map(jax.tree.leaves, (gradient, slope)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
  config.accumulation_steps = 2
  optimizer = make_optimizer(config)
  state = step.init_state(config, model.vocab, optimizer)
  trained = jax.jit(lambda state: step.train_step(config, graphdef, optimizer, state, windows))
  np.testing.assert_allclose(trained(state)[1]['loss'], expected, rtol=1e-5)


@pytest.mark.parametrize(('name', 'arm', 'chunk'), [('payload', 'gqa', 5), ('copy', 'mla', 64)])
def test_through_the_cache_as_in_parallel(name, arm, chunk):
  config = probe_config(name, arm)
  windows = eval_windows(load_data(config).validation, seq_len=24, max_tokens=100)
  model = make_model(config, probes.parse(config).vocab)
  read = evaluate.read_through_cache(model, windows, 'float32', mesh_of((1, 1, 1)), chunk)
  logits = np.asarray(forward(model, jnp.asarray(windows.tokens[..., :-1])))
  targets = windows.tokens[..., -1]
  right = (logits.argmax(axis=-1) == targets).sum(axis=1)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(targets, 0))
  np.testing.assert_array_equal(read.right, right)
  np.testing.assert_allclose(read.by_window, (nll * windows.mask).sum(axis=1), rtol=1e-5)


def test_a_run_of_a_probe(tmp_path, capsys):
  """Trained, gone on with, evaluated; refused where text would be needed."""
  config = probe_config('payload', num_layers=1, data__eval_tokens=100)
  train_and_evaluate(config, tmp_path / 'run')
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  (last,) = (line for line in lines if line['step'] == 4 and 'eval_loss' in line)
  assert 0 <= last['eval_accuracy'] <= 1 and 'eval_bits_per_byte' not in last
  assert 'payload: 5 records' in capsys.readouterr().out
  (figures,) = evaluate.evaluate_caches(tmp_path / 'run', ['float32'], max_tokens=100)
  assert figures['accuracy'] == pytest.approx(last['eval_accuracy'], abs=0.011)  # one may tip
  assert math.log(figures['perplexity']) == pytest.approx(last['eval_loss'], rel=1e-4)
  assert figures['bits_per_byte'] is None and figures['records'] == 5
  assert figures['bits_recalled'] <= figures['bits_held']
  for use in (generate.load, inside.open_run):
    with pytest.raises(UserError, match='probe:payload: a probe has no text'):
      use(tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  train_and_evaluate(config, tmp_path / 'run')  # goes on from step 2, with the same windows
  again = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert again['eval_loss'] == last['eval_loss']
  with pytest.raises(UserError, match=r'data\.records=6: .* holds a run with data\.records=5'):
    train_and_evaluate(probe_config('payload', num_layers=1, data__records=6), tmp_path / 'run')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__dataset': 'probe:memory'}, 'data.dataset=probe:memory: no such probe; choose one of'),
    ({'data__records': 24}, 'data.records=24: seq_len=24 holds the records and the queries'),
    ({'data__records': 0}, 'data.records=0: must be a positive integer'),
    ({'data__alphabet': 1}, 'data.alphabet=1: of one value none can be forgotten'),
    ({'data__alphabet': 2**20}, 'data.alphabet=1048576: gives 3,145,741 tokens'),
    ({'data__tokenizer': 'bpe:300'}, 'data.tokenizer=bpe:300: probe:payload reads no text'),
    ({'data__files': '*.txt'}, 'data.files=*.txt: probe:payload reads no text'),
    ({'data__dataset': 'probe:copy'}, 'data.attributes=3: copy has one value a record: set 1'),
    (
      {'data__dataset': 'probe:copy', 'data__attributes': 1},
      'data.records=5: seq_len=24 is to be twice that: set 12',
    ),
    (
      {'data__dataset': 'probe:mqar', 'data__attributes': 1, 'data__records': 7},
      'data.records=7: seq_len=24 has room for 6',
    ),
    (
      {'data__dataset': 'probe:multikey', 'data__attributes': 1},
      'data.attributes=1: a record is found by one attribute and asked for another',
    ),
    (
      {'data__dataset': 'probe:multikey', 'data__records': 8},
      'data.alphabet=7: no two of data.records=8 may share a value',
    ),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(UserError) as refused:
    config_lib.validate(probe_config('payload', **changes))
  assert str(refused.value).startswith(message)
