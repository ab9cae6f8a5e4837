"""Bytes, SentencePiece BPE, or a tokenizer.json that somebody else trained.

The first two are lossless: decode(encode(text)) is text.

A tokenizer has `vocab_size`; `bos`, which starts every document and stands for no text; `digest`,
which identifies it; and `byte_lengths` [vocab], the UTF-8 bytes that each token stands for.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from mla import files
from mla.data import bpe
from mla.data.bpe import BpeTokenizer
from mla.data.documents import Raw
from mla.data.hugging_face import HuggingFaceTokenizer
from mla.errors import UserError


class ByteTokenizer:
  """A token a byte, and BOS."""

  vocab_size = 257
  bos = 256
  digest = 'bytes'
  byte_lengths = np.array([1] * 256 + [0], np.int32)

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(
    self, parts: list[Raw], begins: list[bool]
  ) -> Iterator[Integer[np.ndarray, ' n']]:
    """Each part's tokens, and whether a document begins there; theirs may be of a smaller dtype
    than encode()'s."""
    return (np.frombuffer(part, np.uint8) for part in parts)

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """BOS is skipped; bytes that are no UTF-8 become U+FFFD."""
    return self.raw(ids).decode(errors='replace')

  def raw(self, ids: Int[np.ndarray, ' n']) -> bytes:
    """The tokens' text as bytes, which may begin or end in the middle of a letter."""
    return bytes(int(i) for i in ids if i != self.bos)


Tokenizer = ByteTokenizer | BpeTokenizer | HuggingFaceTokenizer
FILE = 'tokenizer.model'  # a run's own, in its workdir; bytes need none
SETTINGS = 'tokenizer_config.json'
HUGGING_FACE = ('tokenizer.json', SETTINGS)  # likewise, of an hf: one


def save(tokenizer: Tokenizer, workdir: Path) -> None:
  """Puts it into a run's workdir, which then needs no corpus to be read and written with."""
  try:
    if isinstance(tokenizer, BpeTokenizer):
      files.write_whole(workdir / FILE, tokenizer.model)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
      for name, path in zip(
        HUGGING_FACE, (tokenizer.path, tokenizer.path.with_name(SETTINGS)), strict=True
      ):
        if path.exists():
          files.write_whole(workdir / name, files.read_bytes(path, 'make it readable'))
  except OSError as error:
    doing = f'{workdir}: its tokenizer cannot be written'
    raise files.cannot(doing, error, 'permit that') from error


def load(spec: str, workdir: Path) -> Tokenizer | None:
  """A run's own; None if it has none, as runs of earlier versions. UserError if it is damaged."""
  if spec == 'bytes':
    return ByteTokenizer()
  if spec.startswith('hf:'):
    own = workdir / HUGGING_FACE[0]
    return HuggingFaceTokenizer(own if own.exists() else Path(spec.removeprefix('hf:')))
  path = workdir / FILE
  cure = 'restore it, or remove it where the text is at hand'
  if not os.path.lexists(path):
    return None
  try:
    return BpeTokenizer(files.read_bytes(path, cure))
  except (RuntimeError, ValueError) as error:
    raise UserError(f'{path}: is no SentencePiece model; {cure}') from error


def ready(spec: str) -> Tokenizer | None:
  """`bytes` or `hf:PATH`; None for `bpe:VOCAB`, which a text has to train first.

  UserError for anything else, and for a tokenizer.json that does not do.
  """
  if spec == 'bytes':
    return ByteTokenizer()
  if spec.startswith('hf:'):
    return HuggingFaceTokenizer(files.local_path('data.tokenizer', spec.removeprefix('hf:')))
  _vocab(spec)
  return None


def identity(spec: str, tokenizer: Tokenizer | None) -> str:
  """What tells ready()'s tokenizer from all others, given the text that trains it."""
  return bpe.identity(_vocab(spec)) if tokenizer is None else tokenizer.digest


def train(
  spec: str, parts: Iterable[Raw], stopping: Callable[[], bool] = lambda: False
) -> BpeTokenizer:
  """bpe.train() for `bpe:VOCAB`."""
  return bpe.train(_vocab(spec), parts, stopping)


def _vocab(spec: str) -> int:
  match = re.fullmatch(r'bpe:(\d{1,7})', spec)
  if not match:
    raise UserError(
      f'data.tokenizer={spec}: choose bytes, bpe:VOCAB such as bpe:4096, or hf:PATH of a '
      'tokenizer.json'
    )
  return int(match[1])
