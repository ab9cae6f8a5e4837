"""Bytes, SentencePiece BPE, or a tokenizer.json that somebody else trained.

The first two are lossless: decode(encode(text)) is text.

A tokenizer has `vocab_size`; `bos`, which starts every document and stands for no text; `digest`,
which identifies it; and `byte_lengths` [vocab], the UTF-8 bytes that each token stands for.
"""

import contextlib
import hashlib
import io
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int, Integer

from mla import files
from mla.data.documents import Raw, digest, pieces
from mla.data.hugging_face import HuggingFaceTokenizer
from mla.errors import MachineError, UserError

SPACE = '\u2581'  # what SentencePiece writes for a space; a text that has it itself is cut there
SAMPLE = 2**25  # bytes of text that BPE is trained on at most
BLOCK = 2**13  # characters that are drawn together
LONGEST_PIECE = 1000  # characters of one training sentence; SentencePiece drops overlong ones


class ByteTokenizer:
  """A token a byte, and BOS."""

  vocab_size = 257
  bos = 256
  digest = 'bytes'
  byte_lengths = np.array([1] * 256 + [0], np.int32)

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> Iterator[Integer[np.ndarray, ' n']]:
    """Each text's tokens; theirs may be of a smaller dtype than encode()'s."""
    return (np.frombuffer(text.encode(), np.uint8) for text in texts)

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """BOS is skipped; bytes that are no UTF-8 become U+FFFD."""
    return self.raw(ids).decode(errors='replace')

  def raw(self, ids: Int[np.ndarray, ' n']) -> bytes:
    """The tokens' text as bytes, which may begin or end in the middle of a letter."""
    return bytes(int(i) for i in ids if i != self.bos)


class BpeTokenizer:
  """SentencePiece BPE with byte fallback and no normalisation."""

  def __init__(self, model: bytes):
    self.model = model  # as SentencePiece writes it to a file
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size = self._processor.vocab_size()
    self.bos = self._processor.bos_id()
    self.digest = hashlib.sha256(model).hexdigest()
    self._bytes = [self._text_of(i) for i in range(self.vocab_size)]
    self.byte_lengths = np.array([len(raw) for raw in self._bytes], np.int32)
    self._space = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]

  def _text_of(self, token: int) -> bytes:
    if self._processor.is_byte(token):
      return bytes([int(self._processor.id_to_piece(token)[3:5], 16)])
    if self._processor.is_control(token) or self._processor.is_unknown(token):
      return b''
    return self._processor.id_to_piece(token).replace(SPACE, ' ').encode()

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    first, *rest = self._processor.encode(text.split(SPACE))
    ids = first + [i for part in rest for i in (*self._space, *part)]
    return np.array(ids, np.int32)

  def encode_batch(self, texts: list[str]) -> Iterator[Integer[np.ndarray, ' n']]:
    """Each text's tokens, on all cores."""
    plain = self._processor.encode(
      ['' if SPACE in text else text for text in texts], num_threads=os.cpu_count()
    )
    for text, ids in zip(texts, plain, strict=True):
      yield self.encode(text) if SPACE in text else np.array(ids, np.int32)

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """As ByteTokenizer's."""
    return self.raw(ids).decode(errors='replace')

  def raw(self, ids: Int[np.ndarray, ' n']) -> bytes:
    """As ByteTokenizer's."""
    return b''.join(self._bytes[int(i)] for i in ids)


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


def make_tokenizer(spec: str, train_documents: Iterable[Raw], cache_dir: Path) -> Tokenizer:
  """`bytes`, `hf:PATH`, or `bpe:VOCAB` trained once on train_documents and kept in cache_dir.

  Of more than SAMPLE bytes of text it is trained on about so many, drawn from all of it.

  Where nothing can be kept, a warning says so and it is trained at every start, to the same. Raises
  UserError for a bad spec or a text that does not do for it, MachineError if the disk is full.
  """
  if spec == 'bytes':
    return ByteTokenizer()
  if spec.startswith('hf:'):
    return HuggingFaceTokenizer(files.local_path('data.tokenizer', spec.removeprefix('hf:')))
  match = re.fullmatch(r'bpe:(\d{1,7})', spec)
  if not match:
    raise UserError(
      f'data.tokenizer={spec}: choose bytes, bpe:VOCAB such as bpe:4096, or hf:PATH of a '
      'tokenizer.json'
    )
  vocab = int(match[1])
  settings = f'{spec} {sentencepiece.__version__} {digest(train_documents)}'
  path = cache_dir / f'bpe_{vocab}_{hashlib.sha256(settings.encode()).hexdigest()[:16]}.model'
  model = _kept(path)
  if model is None:
    model = _train_bpe(train_documents, vocab)
    _keep(path, model)
  return BpeTokenizer(model)


def _keep(path: Path, model: bytes) -> None:
  """Writes the model behind a hash of it: a flipped bit can leave a model that loads."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, hashlib.sha256(model).digest() + model)
  except OSError as error:
    doing = f'data.data_dir: cannot keep the tokenizer in {path.parent}'
    failure = files.cannot(doing, error, 'it is trained anew at every start')
    if isinstance(failure, MachineError):
      raise failure from error
    logging.warning('%s', failure)


def _kept(path: Path) -> bytes | None:
  """The model that _keep wrote, or None if it is not there or not whole."""
  with contextlib.suppress(UserError):
    raw = files.read_bytes(path, '')
    model = raw[hashlib.sha256().digest_size :]
    if raw.startswith(hashlib.sha256(model).digest()):
      return model
  return None


def _train_bpe(documents: Iterable[Raw], vocab: int) -> bytes:
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(documents),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      unk_id=0,
      bos_id=1,
      eos_id=-1,
      pad_id=-1,
      num_threads=1,  # the same model every time
      minloglevel=3,
    )
  except RuntimeError as error:
    raise UserError(
      f'data.tokenizer=bpe:{vocab}: this text cannot fill such a vocabulary '
      f'({str(error).rpartition("] ")[2]})'
    ) from error
  return model.getvalue()


def _sentences(documents: Iterable[Raw]) -> Iterator[str]:
  total = sum(map(len, documents))
  draw = random.Random(0)
  for document in documents:
    for text in pieces(document):
      if total > SAMPLE:
        blocks = range(0, len(text), BLOCK)
        text = '\n'.join(text[i : i + BLOCK] for i in blocks if draw.random() * total < SAMPLE)
      for line in re.split(f'[\n{SPACE}]', text):
        yield from (line[i : i + LONGEST_PIECE] for i in range(0, len(line), LONGEST_PIECE))
