"""A tokenizer that somebody else trained: a tokenizer.json, read by the library `tokenizers`."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mla import files
from mla.errors import UserError, first_line

SPACE = '\u2581'


class HuggingFaceTokenizer:
  """The tokenizer.json at `path`; tokenizer_config.json beside it says which token is BOS.

  Where it names none, EOS stands between documents, as in GPT-2. Text that spells a special token
  is text. Raises UserError for a file that is none, and for tokens of which nobody can say which
  bytes they are.
  """

  def __init__(self, path: Path):
    cure = 'name a tokenizer.json in data.tokenizer=hf:PATH'
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
    except Exception as error:  # its own class is Exception itself
      raise UserError(f'{path}: is no tokenizer ({first_line(error)}); {cure}') from error
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
    self._bytes = _bytes_of(found, self._tokenizer.get_vocab(), self.vocab_size, path)
    self.byte_lengths = np.array([len(raw) for raw in self._bytes], np.int32)
    self.bos = self._boundary(path)
    self.digest = hashlib.sha256(raw + str(self.bos).encode()).hexdigest()

  def _boundary(self, path: Path) -> int:
    beside = path.with_name('tokenizer_config.json')
    cure = 'name its bos_token or eos_token there'
    said = files.read_json(beside, cure)
    for key in ('bos_token', 'eos_token'):
      token = said.get(key) if isinstance(said, dict) else None
      token = token.get('content') if isinstance(token, dict) else token
      if isinstance(token, str):
        found = self._tokenizer.token_to_id(token)
        if found is None:
          raise UserError(f'{beside}: {key}={token} is no token of {path}; {cure}')
        return found
    raise UserError(f'{beside}: says of no token that it starts documents; {cure}')

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """Special tokens are skipped; bytes that are no UTF-8 become U+FFFD."""
    return b''.join(self._bytes[int(i)] for i in ids).decode(errors='replace')


def _bytes_of(found: dict[str, Any], vocab: dict[str, int], size: int, path: Path) -> list[bytes]:
  """The text of each token as UTF-8, b'' of special ones and of ids that no token has."""
  if max(vocab.values(), default=0) >= size:
    raise UserError(f'{path}: its ids have gaps, the largest is {max(vocab.values())} of {size}')
  kinds = {part.get('type') for key in ('decoder', 'pre_tokenizer') for part in _parts(found, key)}
  added = {token['id']: token for token in found.get('added_tokens') or ()}
  table = [b''] * size
  for text, index in vocab.items():
    if index in added:
      table[index] = b'' if added[index]['special'] else added[index]['content'].encode()
    elif 'ByteLevel' in kinds:
      table[index] = bytes(_BYTES[character] for character in text)
    elif 'ByteFallback' in kinds or 'Metaspace' in kinds:
      single = len(text) == 6 and text.startswith('<0x') and text.endswith('>')
      table[index] = bytes([int(text[3:5], 16)]) if single else text.replace(SPACE, ' ').encode()
    else:
      raise UserError(
        f'{path}: is neither byte-level nor has byte fallback, so nobody can say which bytes a '
        'token stands for; take another tokenizer'
      )
  return table


def _parts(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
  """A component's parts, of a sequence all of them."""
  part = found.get(key) or {}
  return part.get('decoders') or part.get('pretokenizers') or [part]


def _byte_alphabet() -> dict[str, int]:
  """The byte that each character of a byte-level vocabulary stands for: printable ones of Latin-1
  for themselves, the others in their order from U+0100 on (Radford et al. 2019, GPT-2's code)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in printable]
  return {
    **{chr(byte): byte for byte in printable},
    **{chr(256 + place): byte for place, byte in enumerate(rest)},
  }


_BYTES = _byte_alphabet()
