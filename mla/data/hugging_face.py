"""A tokenizer.json, the format of the `tokenizers` library, that somebody else has trained.

It has to be lossless, or the bytes of the text, which bits per byte are counted by, could not be
told from its tokens: byte-level BPE is (GPT-2, Llama 3, Qwen, SmolLM), and so is SentencePiece with
byte fallback (Llama 2, Mistral). One that composes accents (NFC: Qwen, GPT-NeoX) is taken, and the
bytes are those of the composed text; one that lowers case or changes more than that is refused.
"""

import hashlib
import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mla import files
from mla.data.documents import Raw
from mla.errors import UserError, first_line

SPACE = '\u2581'  # what SentencePiece writes for a space; there a text's own one is read as a space
# Under these names tokenizers keep the token that starts a document, the likeliest first.
STARTS = '<s> <bos> <|begin_of_text|> <|startoftext|> [BOS] <|endoftext|> </s>'.split()
PROBES = (
  'A probe, Of  two   SPACES\tand\r\nlines;\n\n\n  1234567.89 (x_y) == "it\'s"',
  'e\u0301 \u00e9 \ufb01 \uff21 \u2460 \u00a0\u200b \u4f60\u597d \0 \ufeff',
  '\U0001f99c\U0001f1eb\U0001f1f7 \u2047 <0x41>',
)


class HuggingFaceTokenizer:
  """The tokenizer.json at `path`, or in that folder; `digest` tells its content and BOS, no place.

  Special tokens that a text spells out, such as <|endoftext|>, are text like any other. BOS is what
  tokenizer_config.json beside it names (where that has none EOS stands between documents, as in
  GPT-2); without it what the tokenizer itself sets first, a usual name, or a token of its own.
  UserError for what is no tokenizer, and for one that loses text.
  """

  def __init__(self, path: Path):
    path = path / 'tokenizer.json' if path.is_dir() else path
    cure = 'name a tokenizer.json in data.tokenizer=hf:PATH'
    if not path.exists():
      raise UserError(f'{path}: is missing; {cure}')
    self.path = path
    raw = files.read_bytes(path, cure)
    try:
      library = importlib.import_module('tokenizers')
    except ModuleNotFoundError as error:
      raise UserError(
        f"data.tokenizer=hf:{path}: needs the package tokenizers; pip install -e '.[convert]'"
      ) from error
    try:
      self._tokenizer = library.Tokenizer.from_buffer(raw)
      found = json.loads(raw)
      vocab = self._tokenizer.get_vocab(with_added_tokens=True)
      added = self._tokenizer.get_added_tokens_decoder()
    except Exception as error:  # its own class is Exception itself
      raise UserError(f'{path}: is no tokenizer ({first_line(error)}); {cure}') from error
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.bos = self._boundary(path, vocab)
    self.vocab_size = max(*vocab.values(), self.bos) + 1  # there may be gaps
    read = _reader(found, path)
    self._bytes = [b''] * self.vocab_size
    for text, index in vocab.items():
      self._bytes[index] = read(text)
    for index, token in added.items():
      self._bytes[index] = b'' if token.special else token.content.encode()
    self._bytes[self.bos] = b''
    self.byte_lengths = np.array([len(part) for part in self._bytes], np.int32)
    # SentencePiece sets a space before a text. BOS, which stands there too, takes it back.
    self._prefix, self._spares = b'', False
    self._prefix = self._check_lossless(path)
    self.byte_lengths[self.bos] = -len(self._prefix)
    self._within = self._without_prefix(library, found, path) if self._prefix else self._tokenizer
    # Before a text that begins with a space some set none, and that space would pass for theirs.
    self._spares = bool(self._prefix) and self.raw(self._ids(' a')) == b' a'
    marks = str(self.bos) + (' spares' if self._spares else '')
    self.digest = hashlib.sha256(raw + marks.encode()).hexdigest()

  def _boundary(self, path: Path, vocab: dict[str, int]) -> int:
    beside = path.with_name('tokenizer_config.json')
    said = files.read_json(beside, 'mend it or remove it') if beside.exists() else {}
    for key in ('bos_token', 'eos_token'):
      token = said.get(key) if isinstance(said, dict) else None
      token = token.get('content') if isinstance(token, dict) else token
      if isinstance(token, str):
        if token not in vocab:
          raise UserError(f'{beside}: {key}={token} is no token of {path}; mend it or remove it')
        return vocab[token]
    first = self._tokenizer.encode('', add_special_tokens=True).ids[:1]
    named = [vocab[name] for name in STARTS if name in vocab]
    return (first or named or [max(vocab.values(), default=-1) + 1])[0]

  def _check_lossless(self, path: Path) -> bytes:
    """What is read back before each probe: nothing or a space."""
    read = [self.raw(self.encode(probe)) for probe in PROBES]
    for prefix in (b'', b' '):
      for form in (PROBES, [unicodedata.normalize('NFC', probe) for probe in PROBES]):
        if read == [prefix + probe.encode() for probe in form]:
          return prefix
    raise UserError(
      f'{path}: loses text, for what it encodes does not decode to the same; take another, as bits '
      'per byte cannot be told with it'
    )

  def _without_prefix(self, library: Any, described: Any, path: Path) -> Any:
    """The tokenizer that sets nothing before a text, for parts in the midst of a document."""
    bare = {name: _bare(described.get(name)) for name in ('normalizer', 'pre_tokenizer')}
    within = library.Tokenizer.from_str(json.dumps({**described, **bare}))
    within.encode_special_tokens = True
    within.no_truncation()
    within.no_padding()
    ids = within.encode(PROBES[0], add_special_tokens=False).ids
    if self.raw(np.array(ids, np.int32)) != PROBES[0].encode():
      raise UserError(
        f'{path}: sets something before a text that cannot be left out in the midst of a document; '
        'take another'
      )
    return within

  def raw(self, ids: Int[np.ndarray, ' n']) -> bytes:
    """The tokens' text as bytes, which may begin or end in the middle of a letter."""
    return b''.join(self._bytes[int(i)] for i in ids)

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    return self._ids(self._begun(text))

  def _ids(self, text: str) -> Int[np.ndarray, ' n']:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def _begun(self, text: str) -> str:
    """A document's beginning, with the space before it that the tokenizer would spare."""
    return f' {text}' if self._spares and text.startswith(' ') else text

  def encode_batch(self, parts: list[Raw], begins: list[bool]) -> Iterator[Int[np.ndarray, ' n']]:
    """Each part's tokens, on all cores; a part that begins no document has no space before it."""
    texts = [str(part, 'utf-8') for part in parts]
    texts = [
      self._begun(text) if first else text for text, first in zip(texts, begins, strict=True)
    ]
    found: dict[int, Any] = {}
    for tokenizer, wanted in ((self._tokenizer, True), (self._within, False)):
      places = [place for place, first in enumerate(begins) if first == wanted]
      batch = [texts[place] for place in places]
      encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
      found.update(zip(places, encoded, strict=True))
    return (np.array(found.pop(place).ids, np.int32) for place in range(len(texts)))

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """BOS is skipped; bytes that are no UTF-8 become U+FFFD."""
    return self.raw(ids).removeprefix(self._prefix).decode(errors='replace')


def _reader(described: Any, path: Path) -> Callable[[str], bytes]:
  """How a token's name is turned into the bytes of the text it stands for."""
  parts = _types(described.get('decoder')) | _types(described.get('pre_tokenizer'))
  if 'ByteLevel' in parts:
    table = byte_level()
    return lambda token: bytes(table[c] for c in token if c in table)
  if described['model'].get('byte_fallback'):

    def read(token: str) -> bytes:
      byte = re.fullmatch('<0x([0-9A-F]{2})>', token)
      return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, ' ').encode()

    return read
  raise UserError(
    f'{path}: is neither byte-level nor has byte fallback, so nobody can say which bytes a token '
    'stands for; take another tokenizer'
  )


def _types(part: Any) -> set[str]:
  """The types that a decoder or pre-tokenizer is made of."""
  if isinstance(part, dict):
    inner = set().union(*(_types(value) for value in part.values()))
    return inner | {part['type']} if isinstance(part.get('type'), str) else inner
  return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _bare(part: Any) -> Any:
  """A normalizer or pre-tokenizer without what it sets before a text."""
  if not isinstance(part, dict):
    return part
  kind = part.get('type')
  if kind == 'Prepend':
    return None
  if kind == 'Metaspace':
    rest = {name: value for name, value in part.items() if name != 'add_prefix_space'}
    return {**rest, 'prepend_scheme': 'never'}
  if kind == 'ByteLevel':
    return {**part, 'add_prefix_space': False}
  if kind == 'Sequence':
    return {
      name: [bare for bare in map(_bare, value) if bare] if isinstance(value, list) else value
      for name, value in part.items()
    }
  return part


def byte_level() -> dict[str, int]:
  """The character that GPT-2's vocabulary writes for each byte, to the byte."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
    chr(256 + n): byte for n, byte in enumerate(others)
  }
