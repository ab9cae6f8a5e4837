"""Tokenizers that others have trained: byte-level ones and SentencePiece's, at toy size."""

import json
import shutil

import numpy as np
import pytest
from conftest import tiny_config
from test_tokenizers import NASTY, TEXT, random_texts
from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from mla import dry_run, memory, workdir
from mla.data import documents, tokenizers
from mla.data.hugging_face import HuggingFaceTokenizer
from mla.data.pipeline import load_run_data, make_stream
from mla.data.tokenizers import ready
from mla.errors import UserError


def byte_level(special: str = '<|endoftext|>') -> Tokenizer:
  """As GPT-2's."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(TEXT, trainer)
  return made


def sentence_piece() -> Tokenizer:
  """As Llama 2's: byte fallback, and a space set before the text."""
  names = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *'\u2581abcdet']
  vocab = {name: number for number, name in enumerate([*names, '\u2581a', 'be'])}
  merges = [('\u2581', 'a'), ('b', 'e')]
  made = Tokenizer(
    models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token='<unk>', fuse_unk=True)
  )
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  made.decoder = decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  made.add_special_tokens(['<s>', '</s>'])
  made.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', vocab['<s>'])]
  )
  return made


@pytest.fixture(scope='module', params=[byte_level, sentence_piece])
def made(request, tmp_path_factory):
  path = tmp_path_factory.mktemp('hf') / 'tokenizer.json'
  request.param().save(str(path))
  return request.param, path


def test_it_encodes_as_the_library_and_loses_nothing(made):
  kind, path = made
  ours, theirs = HuggingFaceTokenizer(path), Tokenizer.from_file(str(path))
  theirs.encode_special_tokens = True
  for text in filter(None, NASTY + random_texts() + TEXT):
    if kind is sentence_piece:  # whose own sign for a space is read as one
      text = text.replace('\u2581', '_')
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text
    assert ours.byte_lengths[[ours.bos, *ids]].sum() == len(text.encode())
    assert ids.max() < ours.vocab_size == len(ours.byte_lengths)
  assert len(ours.encode('')) == 0


def test_what_is_set_before_a_text_is_set_once_a_document(made, monkeypatch):
  kind, path = made
  ours = HuggingFaceTokenizer(path)
  text = b'a be  cab\n\n be a\n abc'
  for size in range(2, len(text)):
    monkeypatch.setattr(documents, 'PIECE', size)
    ids = make_stream([text, b'a'], ours).tokens
    assert ours.byte_lengths[ids].sum() == len(text) + 1
    first = ids[1 : np.flatnonzero(ids == ours.bos)[1]]
    assert ours.decode(first.astype(np.int32)) == text.decode()


@pytest.mark.parametrize('text', ['  abe', ' abe', 'abe', ' '])
@pytest.mark.parametrize('kind', ['metaspace', 'prepend', 'byte_level'])
def test_a_space_that_a_document_begins_with_is_its_own(tmp_path, kind, text):
  made = byte_level() if kind == 'byte_level' else sentence_piece()
  if kind == 'metaspace':
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  if kind == 'byte_level':
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  made.save(str(tmp_path / 'tokenizer.json'))
  ours = HuggingFaceTokenizer(tmp_path)
  stream = make_stream([text.encode()], ours).tokens
  assert ours.byte_lengths[stream].sum() == len(text)
  assert ours.decode(stream[1:].astype(np.int32)) == ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize('scheme', ['always', 'first'])
def test_metaspace_is_left_out_in_the_midst_too(tmp_path, monkeypatch, scheme):
  made = sentence_piece()
  made.normalizer = normalizers.Sequence([])
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  made.save(str(tmp_path / 'tokenizer.json'))
  ours = HuggingFaceTokenizer(tmp_path)
  monkeypatch.setattr(documents, 'PIECE', 4)
  ids = make_stream([b'abe cab\nbe'], ours).tokens
  assert ours.decode(ids[1:].astype(np.int32)) == 'abe cab\nbe'


def test_bos_is_its_own_start_or_a_usual_name_or_a_new_one(tmp_path):
  kinds = {'<s>': sentence_piece(), '<|endoftext|>': byte_level(), None: byte_level('<odd>')}
  for name, made in kinds.items():
    made.save(str(tmp_path / 't.json'))
    tokenizer = HuggingFaceTokenizer(tmp_path / 't.json')
    assert made.id_to_token(tokenizer.bos) == name
    assert tokenizer.vocab_size == made.get_vocab_size() + (name is None)
    assert tokenizer.bos < tokenizer.vocab_size


def test_tokenizer_config_json_names_bos(tmp_path):
  made = byte_level()
  made.add_special_tokens(['<go>'])
  made.save(str(tmp_path / 'tokenizer.json'))
  for settings in [{'bos_token': '<go>'}, {'bos_token': None, 'eos_token': {'content': '<go>'}}]:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    assert HuggingFaceTokenizer(tmp_path).bos == made.token_to_id('<go>')
  for content in ['{"bos_token": "<no>"}', '{']:
    (tmp_path / 'tokenizer_config.json').write_text(content)
    with pytest.raises(UserError, match='tokenizer_config.json: .*mend it or remove it'):
      HuggingFaceTokenizer(tmp_path)


def test_a_text_that_spells_out_a_special_token_is_text(tmp_path):
  byte_level().save(str(tmp_path / 't.json'))
  tokenizer = HuggingFaceTokenizer(tmp_path / 't.json')
  ids = tokenizer.encode('a<|endoftext|>b')
  assert tokenizer.bos not in ids and tokenizer.decode(ids) == 'a<|endoftext|>b'


def test_its_content_tells_it_apart_and_its_place_does_not(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  for folder in (one, two):
    folder.mkdir()
    byte_level().save(str(folder / 'tokenizer.json'))
  first, second = (ready(f'hf:{folder}') for folder in (one, two))
  assert first.digest == second.digest
  (two / 'tokenizer.json').write_text((two / 'tokenizer.json').read_text() + ' ')
  assert ready(f'hf:{two}').digest != first.digest
  here, there = (tiny_config(data__tokenizer=f'hf:{folder}') for folder in (one, two))
  assert workdir.difference(here, there)[0] == ''
  assert workdir.difference(here, tiny_config())[0] == 'data.tokenizer'


def test_its_vocabulary_counts_before_any_text_is_read(tmp_path):
  byte_level().save(str(tmp_path / 'tokenizer.json'))
  config = tiny_config(data__tokenizer=f'hf:{tmp_path}')
  assert memory.vocabulary(config) == HuggingFaceTokenizer(tmp_path).vocab_size
  missing = tiny_config(data__tokenizer=f'hf:{tmp_path}/none')
  assert memory.vocabulary(missing) == 1
  with pytest.raises(UserError, match='none: is missing; name a tokenizer.json'):
    dry_run.measure(missing, dry_run.find(None, None, None), context=1)


def test_a_run_reads_with_the_tokenizer_it_keeps(text, tmp_path):
  theirs, run = tmp_path / 'theirs', tmp_path / 'run'
  for folder in (theirs, run):
    folder.mkdir()
  byte_level().save(str(theirs / 'tokenizer.json'))
  fields = {'data__files': str(text), 'data__data_dir': str(tmp_path / 'data')}
  config = tiny_config(data__tokenizer=f'hf:{theirs}/tokenizer.json', **fields)
  before = load_run_data(run, config)  # keeps none yet: the config's
  tokenizers.save(before.tokenizer, run)
  shutil.rmtree(theirs)
  after = load_run_data(run, config)
  assert after.digest == before.digest
  np.testing.assert_array_equal(after.validation.tokens, before.validation.tokens)
  with pytest.raises(UserError, match='data.tokenizer=hf:'):
    load_run_data(tmp_path, config)


def changing(normalizer) -> Tokenizer:
  made = byte_level()
  made.normalizer = normalizer
  return made


def test_composing_accents_is_no_loss(tmp_path):
  changing(normalizers.NFC()).save(str(tmp_path / 't.json'))
  tokenizer = HuggingFaceTokenizer(tmp_path / 't.json')
  assert tokenizer.decode(tokenizer.encode('e\u0301')) == '\u00e9'


@pytest.mark.parametrize('normalizer', [normalizers.Lowercase(), normalizers.NFKC()])
def test_what_loses_text_is_refused(tmp_path, normalizer):
  changing(normalizer).save(str(tmp_path / 't.json'))
  with pytest.raises(UserError, match='t.json: loses text'):
    HuggingFaceTokenizer(tmp_path / 't.json')


@pytest.mark.parametrize('content', [b'', b'{}', b'[1]', b'\xff', b'{"model": {}}', None])
def test_what_is_no_tokenizer_is_one_line(tmp_path, content):
  if content is not None:
    (tmp_path / 'tokenizer.json').write_bytes(content)
  with pytest.raises(UserError, match='tokenizer.json: .*name a tokenizer.json') as caught:
    HuggingFaceTokenizer(tmp_path)
  assert '\n' not in str(caught.value)
