"""Each of our tokenizers as transformers loads it: the same tokens, and the text back."""

import json

import numpy as np
import pytest
import transformers
from planted import WORDS

from mla.convert import vocabulary
from mla.data.hugging_face import HuggingFaceTokenizer
from mla.data.tokenizers import ByteTokenizer, ready, train

TEXTS = [
  WORDS,
  'bottles of beer',
  ' leading and trailing ',
  'a\0b\ttab\r\nline',
  '   many    spaces',
  '<|unused|> <0x41> <s></s>',
  '',
]


def write(described: str, folder) -> HuggingFaceTokenizer:
  folder.mkdir()
  (folder / 'tokenizer.json').write_text(described)
  return HuggingFaceTokenizer(folder)


@pytest.fixture(params=['bytes', 'bpe:300', 'hf'])
def tokenizer(request, text, tmp_path):
  if request.param == 'hf':
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    described = Tokenizer(models.BPE())
    described.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    described.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<|endoftext|>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    described.train_from_iterator([text.read_text(), WORDS], trainer)
    return write(described.to_str(), tmp_path / 'own')
  parts = [text.read_bytes(), (WORDS * 20).encode()]
  return ready(request.param) or train(request.param, parts)


def test_the_same_tokens(tokenizer, tmp_path):
  for name, content in vocabulary.to_files(tokenizer).items():
    (tmp_path / name).write_text(content)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'deepseek_v3'}))
  their = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(their) == tokenizer.vocab_size and their.bos_token_id == tokenizer.bos
  for words in TEXTS:
    ours = tokenizer.encode(words)
    np.testing.assert_array_equal(their.encode(words, add_special_tokens=False), ours)
    assert their.decode(ours) == tokenizer.decode(ours) == words
    if not isinstance(tokenizer, HuggingFaceTokenizer):
      np.testing.assert_array_equal(their(words).input_ids, [tokenizer.bos, *ours])


def test_they_come_back(tokenizer, tmp_path):
  for name, content in vocabulary.to_files(tokenizer).items():
    (tmp_path / name).write_text(content)
  back = vocabulary.from_folder(tmp_path, tokenizer.vocab_size)
  again = write(back['tokenizer.json'], tmp_path / 'again')
  assert (again.vocab_size, again.bos) == (tokenizer.vocab_size, tokenizer.bos)
  for words in TEXTS:
    np.testing.assert_array_equal(again.encode(words), tokenizer.encode(words))
  lengths = again.byte_lengths.copy()
  if isinstance(tokenizer, ByteTokenizer):
    np.testing.assert_array_equal(lengths, tokenizer.byte_lengths)


def test_a_rounded_vocabulary_is_filled(tmp_path):
  for name, content in vocabulary.to_files(ByteTokenizer()).items():
    (tmp_path / name).write_text(content)
  found = vocabulary.from_folder(tmp_path, 320)
  assert write(found['tokenizer.json'], tmp_path / 'again').vocab_size == 320
