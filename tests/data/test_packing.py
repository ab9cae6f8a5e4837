"""Where documents begin: in windows, in memory and in prepared tokens; and what asks for it."""

import json

import numpy as np
import pytest
from conftest import tiny_config

from mla import config as config_lib
from mla.data import packing, pipeline
from mla.data.pipeline import TokenStream, eval_windows, load_data, make_stream, train_batches
from mla.data.tokenizers import ByteTokenizer
from mla.errors import UserError


def by_token(tokens: np.ndarray, first: bool = False) -> np.ndarray:
  """The place of the last BOS up to each token, 0 before any."""
  found = np.zeros(len(tokens), int)
  for place, token in enumerate(tokens):
    found[place] = place if token == 256 else found[place - 1] if place else 0
  return found


@pytest.mark.parametrize('length', [1, 4, 9])
def test_a_windows_tokens_tell_where_their_documents_begin(length):
  texts = [b'', b'a', b'seven..', b'', b'x' * 23, b'yz']
  stream = make_stream(texts, ByteTokenizer())
  assert stream.tokens[stream.documents].tolist() == [256] * 6
  assert np.sum(stream.tokens == 256) == 6
  windows = np.arange(0, len(stream.tokens) - length + 1)
  found = packing.starts(stream.documents, windows, length)
  for row, window in zip(found, windows, strict=True):
    np.testing.assert_array_equal(row, by_token(stream.tokens[window : window + length]))


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'records.jsonl'
  texts = ('word ' * (n % 7) + str(n) for n in range(150))
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return tiny_config(data__files=str(path), data__data_dir=str(tmp_path), data__packing='documents')


def test_tokens_in_memory_and_in_files_tell_the_same(config, monkeypatch):
  small = load_data(config)
  monkeypatch.setattr(pipeline, 'SMALL', 0)
  large = load_data(config)
  assert isinstance(large.train.tokens, np.memmap) and not large.train.documents.flags.owndata
  sizes = {'seq_len': 31, 'batch_size': 4}
  one, other = (train_batches(data.train, **sizes, seed=0) for data in (small, large))
  for _ in range(20):
    (tokens, starts), (same, likewise) = next(one), next(other)
    np.testing.assert_array_equal(tokens, same)
    np.testing.assert_array_equal(starts, likewise)
    np.testing.assert_array_equal(starts, [by_token(row[:-1]) for row in tokens])
  found = [eval_windows(data.validation, seq_len=31) for data in (small, large)]
  for one, other in zip(*found, strict=True):
    np.testing.assert_array_equal(one, other)
  expected = [by_token(row[:-1]) for row in found[0].tokens]
  np.testing.assert_array_equal(found[0].starts[found[0].mask], np.array(expected)[found[0].mask])


def test_windows_their_order_and_identity_are_those_without(config):
  packed = load_data(config)
  config.data.packing = ''
  plain = load_data(config)
  assert plain.digest == packed.digest and plain.train.documents is None
  one, other = (
    train_batches(data.train, seq_len=31, batch_size=4, seed=3, rows=np.array([1, 3]))
    for data in (packed, plain)
  )
  for _ in range(40):  # beyond an epoch
    (tokens, starts), (same, nothing) = next(one), next(other)
    np.testing.assert_array_equal(tokens, same)
    assert nothing is None and starts.shape == (2, 31)
  assert eval_windows(plain.validation, seq_len=31).starts is None


def test_a_text_of_one_document_is_told(config, tmp_path, caplog):
  load_data(config)
  assert not caplog.messages
  (tmp_path / 'one.txt').write_text('a line of text\n' * 99)
  config.data.files = str(tmp_path / 'one.txt')
  load_data(config)
  (message,) = caplog.messages
  assert message.startswith('data.packing=documents: ') and '\n' not in message


def test_another_word_is_refused():
  with pytest.raises(UserError, match="data.packing=sequences: choose one of '', documents"):
    config_lib.validate(tiny_config(data__packing='sequences'))


def test_a_stream_that_knows_no_documents_has_no_starts():
  batches = train_batches(TokenStream(np.arange(99)), seq_len=9, batch_size=2, seed=0)
  assert next(batches).starts is None
