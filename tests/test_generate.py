"""Text from a run: what streams is what model.generate draws, and a run needs no corpus for it."""

import itertools
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHORT_RUN, tiny_config

from mla import generate
from mla import model as model_lib
from mla.data.tokenizers import BpeTokenizer, ByteTokenizer
from mla.errors import UserError
from mla.train import train_and_evaluate

PROMPTS = np.array([[3, 1, 4, 0, 0], [2, 7, 1, 8, 2]], np.int32)
LENGTHS = np.array([3, 5], np.int32)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_what_streams_is_what_is_generated_in_one_loop(temperature):
  model = model_lib.make_model(tiny_config(), 61)
  how = {'steps': 7, 'temperature': temperature, 'top_p': 0.9}

  def cache():
    return model_lib.allocate_cache(model, batch=2, slots=12, dtype='float32')

  key = jax.random.key(5)
  expected, _ = model_lib.generate(
    model, cache(), jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), key, **how
  )
  streamed = list(generate.stream(model, cache(), PROMPTS, LENGTHS, key, **how))
  np.testing.assert_array_equal(np.stack(streamed, axis=1), expected)


def written(monkeypatch, rows: list[list[int]]) -> tuple[list[str], generate.Written]:
  """What write() says where the model draws these tokens, a list a row."""
  monkeypatch.setattr(generate, 'stream', lambda *args, **how: iter(np.array(rows).T))
  config = tiny_config()
  run = generate.Run(config, ByteTokenizer(), model_lib.make_model(config, 257), 1)
  texts = [''] * len(rows)

  def say(row: int, text: str) -> None:
    texts[row] += text

  return texts, generate.write(run, ['a'] * len(rows), say, steps=len(rows[0]))


def test_a_letter_of_several_bytes_comes_whole_and_a_torn_one_is_marked(monkeypatch):
  whole, torn = 'né∀'.encode(), 'n∀'.encode()
  rows = [list(whole), [*torn, 0x20, 0xE2]]
  texts, took = written(monkeypatch, [row[:6] for row in rows])
  assert texts == ['né∀', 'n∀ \ufffd']
  assert took.tokens == 12


def test_a_row_ends_where_another_document_begins(monkeypatch):
  bos = ByteTokenizer.bos
  texts, took = written(monkeypatch, [[104, 105, bos, 106], [104, bos, 105, 105]])
  assert texts == ['hi', 'h']
  assert took.tokens == 3


def test_a_tokens_time_is_a_steps_where_rows_end_early(monkeypatch):
  """Four steps after the second, of 10 ms each, the other row long at its end."""
  clock = itertools.count(step=0.01)
  monkeypatch.setattr(generate, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
  bos = ByteTokenizer.bos
  _, took = written(monkeypatch, [[104] * 6, [104, bos, 1, 1, 1, 1]])
  card = generate.card(generate.Run(None, None, None, 1), took, 'bfloat16')
  assert '10.00 ms a token, 100 tokens a second' in card
  _, took = written(monkeypatch, [[104, 104, bos]])  # of one step nothing came that could be timed
  assert 'a second' not in generate.card(generate.Run(None, None, None, 1), took, 'int8')


def test_a_seed_draws_the_same_whatever_jax_draws_with(monkeypatch):
  keys = []
  run = generate.Run(tiny_config(), ByteTokenizer(), model_lib.make_model(tiny_config(), 257), 1)

  def stream(model, cache, prompts, lengths, key, **how):
    keys.append(key)
    return iter([np.array([104])])

  monkeypatch.setattr(generate, 'stream', stream)
  for flag in ('threefry2x32', 'rbg'):
    with jax.default_prng_impl(flag):
      generate.write(run, ['a'], lambda row, text: None, steps=1, seed=7)
  first, second = (np.asarray(jax.random.key_data(key)) for key in keys)
  np.testing.assert_array_equal(first, second)


@pytest.fixture(scope='module')
def run_of_subwords(tmp_path_factory, text):
  """A run with a tokenizer of its own, whose text is gone."""
  folder = tmp_path_factory.mktemp('subwords')
  own = shutil.copy(text, folder / 'own.txt')
  fields = {name.replace('.', '__'): value for name, value in SHORT_RUN.items()}
  fields |= {'num_steps': 2, 'warmup_steps': 0, 'batch_size': 8}
  config = tiny_config(
    data__files=str(own), data__tokenizer='bpe:300', data__data_dir=str(folder / 'cache'), **fields
  )
  train_and_evaluate(config, folder / 'run')
  shutil.rmtree(folder / 'cache')
  (folder / 'own.txt').unlink()
  return folder / 'run'


def test_a_run_writes_without_its_corpus(run_of_subwords):
  run = generate.load(run_of_subwords)
  assert isinstance(run.tokenizer, BpeTokenizer) and run.step == 2
  said = []
  took = generate.write(
    run, ['bottles'], lambda row, text: said.append(text), steps=9, temperature=0.0,
    cache_dtype='int8',
  )  # fmt: skip
  assert took.tokens == 9 and ''.join(said)
  slots = 32 + 9
  assert took.cache_bytes == took.cache_bytes_per_token * slots
  assert f'{took.cache_bytes:,} bytes' in generate.card(run, took, 'int8')


def test_another_tokenizer_is_refused(run_of_subwords, tmp_path):
  run = shutil.copytree(run_of_subwords, tmp_path / 'run')
  raw = (run / 'tokenizer.model').read_bytes()
  (run / 'tokenizer.model').write_bytes(raw[: len(raw) // 2])
  with pytest.raises(UserError, match='tokenizer.model: is no SentencePiece|is not the one'):
    generate.load(run)
  (run / 'tokenizer.model').unlink()
  with pytest.raises(UserError, match='data.files'):  # its text, which an older run needs
    generate.load(run)


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'steps': 0}, '--steps=0'),
    ({'temperature': float('nan')}, '--temperature=nan'),
    ({'top_p': 0.0}, '--top_p=0.0'),
    ({'cache_dtype': 'int4'}, '--cache_dtype=int4: choose one of float32'),
    ({'batch': 0}, '--batch=0'),
  ],
)
def test_what_cannot_be_asked_for(change, named):
  asked = {'steps': 1, 'temperature': 1.0, 'top_p': 1.0, 'cache_dtype': 'int8', 'batch': 1}
  with pytest.raises(UserError, match=named):
    generate.check(**{**asked, **change})
