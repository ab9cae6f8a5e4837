import random

import numpy as np
import pytest
import sentencepiece
from conftest import break_as

from mla.data import bpe
from mla.data.tokenizers import ready, train
from mla.errors import UserError

TEXT = [
  'The president spoke to the congress of the several states about peace and commerce.\n' * 30,
  'Fellow citizens of the senate, I lay before you measures of necessary expediency. ' * 30,
]
RAW = [text.encode() for text in TEXT]
NASTY = [
  '',
  ' ',
  '  two  spaces  ',
  'tab\tand\r\nlines\n\n',
  'a \u2581 block \u2581\u2581',
  '\u2581',
  'nul \0 byte',
  'emoji 🦜🇫🇷 and é',
  '<0x41> <s> <unk> \u2047',
  '\ufeff\u200b\u00a0',
  'ﬁ ﬀ Å ①',  # normalisation would change these
]


def make(spec: str):
  return ready(spec) or train(spec, RAW)


def random_texts():
  draw = random.Random(0)
  points = [p for p in range(0x3000) if not 0xD800 <= p < 0xE000] + list(range(0x1F300, 0x1F600))
  return [''.join(chr(draw.choice(points)) for _ in range(draw.randrange(80))) for _ in range(50)]


@pytest.fixture(scope='module', params=['bytes', 'bpe:400'])
def tokenizer(request):
  return make(request.param)


def test_round_trip_is_lossless(tokenizer):
  for text in NASTY + random_texts() + TEXT:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_ids_and_bos_are_in_the_vocabulary(tokenizer):
  ids = np.concatenate([tokenizer.encode(text) for text in NASTY])
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
  assert tokenizer.bos not in ids
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.byte_lengths[tokenizer.bos] == 0
  assert tokenizer.decode(np.array([tokenizer.bos, *tokenizer.encode('x')])) == 'x'


def test_bpe_has_the_asked_size_and_compresses():
  tokenizer = train('bpe:400', RAW)
  assert tokenizer.vocab_size == 400
  assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) / 3


def test_bpe_is_the_same_every_time():
  first = train('bpe:400', RAW)
  assert train('bpe:400', RAW).digest == first.digest
  assert train('bpe:400', [*RAW, b'another text']).digest != first.digest


def test_words_one_by_one_are_what_sentencepiece_makes_of_the_whole():
  """But for its own sign of a space, which it takes for one."""
  tokenizer = train('bpe:400', RAW)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  for text in NASTY + random_texts() + TEXT:
    text = text.replace('\u2581', '_')
    assert tokenizer.encode(text).tolist() == theirs.encode(text)


def test_words_are_forgotten_and_encoded_again(monkeypatch):
  tokenizer = train('bpe:400', RAW)
  before = [tokenizer.encode(text).tolist() for text in TEXT]
  monkeypatch.setattr(bpe, 'WORDS', 3)
  assert [tokenizer.encode(text).tolist() for text in TEXT] == before


def test_of_a_large_text_a_bounded_sample_is_drawn_from_all_of_it(monkeypatch):
  monkeypatch.setattr(bpe, 'BLOCK', 10)
  parts = [f'{n:09d} '.encode() for n in range(1000)]
  before = bpe.identity(400)
  for sample, most in ((10_000, 1000), (9_999, 999), (500, 50)):
    monkeypatch.setattr(bpe, 'SAMPLE', sample)
    drawn = bpe._sample(iter(parts), lambda: False)
    assert len(drawn) == most and drawn == sorted(set(drawn))
    assert 300 < np.mean([int(text) for text in drawn]) < 700  # sigma of 50: 41
  assert bpe.identity(400) != before


@pytest.mark.parametrize('spec', ['', 'words', 'bpe', 'bpe:', 'bpe:abc', 'bpe:10', 'bpe:900000'])
def test_a_bad_spec_is_one_line(spec):
  with pytest.raises(UserError, match='data.tokenizer=') as caught:
    make(spec)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('damage', ['gone', b'', b'null', b'\0' * 3000, 'torn', 'bit', 'pipe'])
def test_a_damaged_kept_model_is_none(tmp_path, damage):
  tokenizer = bpe.keep(train('bpe:400', RAW), tmp_path)
  assert bpe.kept(tmp_path).digest == tokenizer.digest
  break_as(tmp_path / bpe.KEPT, damage)
  assert bpe.kept(tmp_path) is None
