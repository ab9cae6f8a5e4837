"""Tokenizers in the format of transformers: tokenizer.json and tokenizer_config.json, both ways."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from mla import files
from mla.convert.sources import dumps
from mla.data.hugging_face import SPACE, HuggingFaceTokenizer, byte_level
from mla.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from mla.errors import UserError

TOKENIZER, SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
CONTROL, USER_DEFINED = 3, 4  # of GGUF's token types


def from_folder(folder: Path, vocab: int) -> dict[str, str]:
  """A model's own tokenizer files by name, with ids up to the vocabulary of its embedding."""
  path = folder / TOKENIZER
  if not path.exists():
    other = folder / 'tokenizer.model'
    hint = f'{other.name} alone is not read; save it as a fast tokenizer' if other.exists() else ''
    raise UserError(f'{path}: is missing; {hint or "fetch it again"}')
  found = files.read_json(path, 'fetch it again')
  if not isinstance(found, dict) or not isinstance(found.get('model'), dict):
    raise UserError(f'{path}: is no tokenizer; fetch it again')
  _fill(found, vocab, path)
  settings: Any = {}
  if (folder / SETTINGS).exists():
    settings = files.read_json(folder / SETTINGS, 'fetch it again')
    if not isinstance(settings, dict):
      raise UserError(f'{folder / SETTINGS}: is no JSON object; fetch it again')
  return {TOKENIZER: json.dumps(found, ensure_ascii=False), SETTINGS: dumps(settings)}


def from_gguf(fields: dict[str, Any], vocab: int, path: Path) -> dict[str, str]:
  """The tokenizer that a GGUF file carries, if it is a byte-level BPE of a known kind."""
  model, kind = fields.get('tokenizer.ggml.model'), fields.get('tokenizer.ggml.pre')
  if model != 'gpt2':
    raise UserError(f'{path}: tokenizer.ggml.model={model}: is not read; only gpt2 is')
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  digits = {'type': 'Digits', 'individual_digits': True}
  splits = {
    'gpt-2': level,
    'smollm': {'type': 'Sequence', 'pretokenizers': [digits, level]},
  }
  if kind not in splits:
    raise UserError(
      f'{path}: tokenizer.ggml.pre={kind}: is not read; those that are: {", ".join(splits)}'
    )
  tokens, types = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
  special = [index for index, of in enumerate(types) if of in (CONTROL, USER_DEFINED)]
  added = [_added(index, tokens[index], types[index] == CONTROL) for index in special]
  found = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': None,
    'pre_tokenizer': splits[kind],
    'post_processor': None,
    'decoder': level,
    'model': _bpe(
      {token: index for index, token in enumerate(tokens)},
      [merge.split(' ') for merge in fields['tokenizer.ggml.merges']],
    ),
  }
  _fill(found, vocab, path)
  settings: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for name in ('bos', 'eos'):
    index = fields.get(f'tokenizer.ggml.{name}_token_id')
    if index is not None:
      settings[f'{name}_token'] = tokens[index]
  return {TOKENIZER: json.dumps(found, ensure_ascii=False), SETTINGS: dumps(settings)}


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': None,
    'end_of_word_suffix': None,
    'fuse_unk': False,
    'byte_fallback': False,
    'ignore_merges': False,
    'vocab': vocab,
    'merges': list(merges),
    **more,
  }


def _added(index: int, content: str, special: bool = True) -> dict[str, Any]:
  return {
    'id': index,
    'content': content,
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    'normalized': False,
    'special': special,
  }


def _fill(found: dict[str, Any], vocab: int, path: Path) -> None:
  """Names the ids that only the embedding has, for a vocabulary rounded up is one that can be
  predicted; UserError if there are tokens that it lacks."""
  entries = found['model'].get('vocab') or {}
  own = entries.values() if isinstance(entries, dict) else range(len(entries))
  taken = {*own, *(token['id'] for token in found.get('added_tokens') or ())}
  if taken and max(taken) >= vocab:
    raise UserError(
      f'{path}: has {max(taken) + 1:,} tokens, and the embedding {vocab:,}; these are not of one '
      'model'
    )
  missing = [index for index in range(vocab) if index not in taken]
  found['added_tokens'] = [
    *(found.get('added_tokens') or ()),
    *(_added(index, f'<|unused_{index}|>') for index in missing),
  ]


def to_files(tokenizer: Tokenizer) -> dict[str, str]:
  """A run's tokenizer as files that transformers loads, by name: it reads special tokens that a
  text spells out as text, and sets BOS before each text, as ours do; an hf: tokenizer keeps the
  rules of its own file for that."""
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'split_special_tokens': True,
  }
  if isinstance(tokenizer, HuggingFaceTokenizer):
    found = files.read_json(tokenizer.path, 'restore it')
    name = _name(found, tokenizer.bos)
    if name is None:  # BOS is ours alone
      name = '<|bos|>'
      found['added_tokens'] = [*(found.get('added_tokens') or ()), _added(tokenizer.bos, name)]
  else:
    name = '<s>'
    found = _bytes() if isinstance(tokenizer, ByteTokenizer) else _sentencepiece(tokenizer)
    found['added_tokens'] = [_added(tokenizer.bos, name)]
    start = {'SpecialToken': {'id': name, 'type_id': 0}}
    text = {'Sequence': {'id': 'A', 'type_id': 0}}
    found['post_processor'] = {
      'type': 'TemplateProcessing',
      'single': [start, text],
      'pair': [start, text, {'Sequence': {'id': 'B', 'type_id': 1}}],
      'special_tokens': {name: {'id': name, 'ids': [tokenizer.bos], 'tokens': [name]}},
    }
  settings |= {'bos_token': name, 'eos_token': name}
  return {TOKENIZER: json.dumps(found, ensure_ascii=False), SETTINGS: dumps(settings)}


def _bytes() -> dict[str, Any]:
  """A token a byte, in the letters that byte-level vocabularies write bytes with."""
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  vocab = {letter: byte for letter, byte in byte_level().items()} | {'<s>': 256}
  return _described(level, level, _bpe(vocab, []))


def _sentencepiece(tokenizer: BpeTokenizer) -> dict[str, Any]:
  """SentencePiece's BPE: pieces merge in the order of their numbers.

  A space is written as a space, so that a text's own U+2581, of which no piece is made, falls back
  to bytes as it does in ours.
  """
  own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  vocab, whole = {}, set()
  for number in range(own.vocab_size()):
    piece = own.id_to_piece(number).replace(SPACE, ' ')
    vocab[piece] = number
    if not (own.is_byte(number) or own.is_control(number) or own.is_unknown(number)):
      whole.add(piece)
  merges = []
  for piece in sorted(whole, key=vocab.__getitem__):
    splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    pairs = [pair for pair in splits if pair[0] in whole and pair[1] in whole]
    merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
  decoder = {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]}
  return _described(None, decoder, _bpe(vocab, merges, byte_fallback=True))


def _name(found: dict[str, Any], number: int) -> str | None:
  """What a tokenizer.json calls a token; None if it has none of this number."""
  for token in found.get('added_tokens') or ():
    if token['id'] == number:
      return token['content']
  entries = found['model']['vocab'].items()
  return next((name for name, other in entries if other == number), None)


def _described(splitter: Any, decoder: Any, model: dict[str, Any]) -> dict[str, Any]:
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [],
    'normalizer': None,
    'pre_tokenizer': splitter,
    'post_processor': None,
    'decoder': decoder,
    'model': model,
  }
