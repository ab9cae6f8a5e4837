"""SentencePiece BPE, trained here: on a bounded, seeded sample of the text, the same every time."""

import contextlib
import hashlib
import heapq
import io
import itertools
import operator
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int, Integer

from mla import files, signals
from mla.data.documents import Raw
from mla.errors import UserError

SPACE = '\u2581'  # what SentencePiece writes for a space; a text that has it itself is cut there
SAMPLE = 2**25  # bytes of text that BPE is trained on at most
BLOCK = 2**13  # characters that are drawn together
LONGEST_PIECE = 1000  # characters of one training sentence; SentencePiece drops overlong ones
KEPT = 'bpe'  # a model in a store of tokens
# No token has a space but as its first, or a line's end: training cuts text there. So what
# lies between is encoded alone, to the same tokens.
WORD = re.compile(f' ?[^ \n{SPACE}]+|[ \n{SPACE}]')
WORDS = 2**18  # of which the tokens are remembered


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
    self._words: dict[str, bytes] = {}  # the tokens of each, as 32-bit numbers

  def _text_of(self, token: int) -> bytes:
    if self._processor.is_byte(token):
      return bytes([int(self._processor.id_to_piece(token)[3:5], 16)])
    if self._processor.is_control(token) or self._processor.is_unknown(token):
      return b''
    return self._processor.id_to_piece(token).replace(SPACE, ' ').encode()

  def encode(self, text: str) -> Int[np.ndarray, ' n']:
    words = WORD.findall(text)
    if len(self._words) > WORDS:
      self._words.clear()  # the common ones are soon back
    new = list(set(words).difference(self._words))
    self._words.update(zip(new, map(self._word, new), strict=True))
    return np.frombuffer(b''.join([self._words[word] for word in words]), np.int32)

  def _word(self, word: str) -> bytes:
    if word == SPACE:  # to SentencePiece it would be a space
      ids = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
    else:
      ids = self._processor.encode(word)
    return np.array(ids, np.int32).tobytes()

  def encode_batch(
    self, parts: list[Raw], begins: list[bool]
  ) -> Iterator[Integer[np.ndarray, ' n']]:
    """As ByteTokenizer's."""
    return (self.encode(str(part, 'utf-8')) for part in parts)

  def decode(self, ids: Int[np.ndarray, ' n']) -> str:
    """As ByteTokenizer's."""
    return self.raw(ids).decode(errors='replace')

  def raw(self, ids: Int[np.ndarray, ' n']) -> bytes:
    """As ByteTokenizer's."""
    return b''.join(self._bytes[int(i)] for i in ids)


def identity(vocab: int) -> str:
  """What the model depends on beside the text."""
  return f'bpe:{vocab} {SAMPLE} {BLOCK} {LONGEST_PIECE} {sentencepiece.__version__}'


def keep(tokenizer: BpeTokenizer, folder: Path) -> BpeTokenizer:
  """Writes the model behind a hash of it: a flipped bit can leave a model that loads."""
  model = tokenizer.model
  files.write_whole(folder / KEPT, hashlib.sha256(model).digest() + model)
  return tokenizer


def kept(folder: Path) -> BpeTokenizer | None:
  """The one that keep() wrote, or None if it is not there or not whole."""
  with contextlib.suppress(UserError):
    raw = files.read_bytes(folder / KEPT, '')
    model = raw[hashlib.sha256().digest_size :]
    if raw.startswith(hashlib.sha256(model).digest()):
      return BpeTokenizer(model)
  return None


def train(
  vocab: int, parts: Iterable[Raw], stopping: Callable[[], bool] = lambda: False
) -> BpeTokenizer:
  """Trained on a text's parts; of more than SAMPLE bytes on about so many, drawn from all of them.

  UserError for a text that cannot fill such a vocabulary; signals.Stopped if stopping().
  """
  texts = _sample(parts, stopping)
  model = io.BytesIO()
  failed: list[Exception] = []

  def work() -> None:
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
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
    except Exception as error:
      failed.append(error)

  # On a thread of its own: a signal is noticed by the first one, when that runs Python.
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  while thread.is_alive():
    if stopping():
      raise signals.Stopped
    thread.join(0.1)
  for error in failed:
    if not isinstance(error, RuntimeError):
      raise error
    raise UserError(
      f'data.tokenizer=bpe:{vocab}: this text cannot fill such a vocabulary '
      f'({str(error).rpartition("] ")[2]})'
    ) from error
  return BpeTokenizer(model.getvalue())


def _sample(parts: Iterable[Raw], stopping: Callable[[], bool]) -> list[str]:
  """The parts; of more than SAMPLE bytes so many in blocks, each as likely as any other."""
  draw = random.Random(0)
  total = size = 0
  number = itertools.count()
  waiting: list[str] = []  # the whole text, so long as that is not too much
  drawn: list[tuple[float, int, str]] = []  # a heap: blocks, those with the highest lots first
  for part in parts:
    if stopping():
      raise signals.Stopped
    waiting.append(str(part, 'utf-8'))
    total += len(part)
    if total <= SAMPLE:
      continue
    for text in waiting:
      for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        heapq.heappush(drawn, (-draw.random(), next(number), block))
        size += len(block)
        while size > SAMPLE:
          size -= len(heapq.heappop(drawn)[2])
    waiting.clear()
  return waiting or [block for *_, block in sorted(drawn, key=operator.itemgetter(1))]


def _sentences(texts: list[str]) -> Iterator[str]:
  for text in texts:
    for line in re.split(f'[\n{SPACE}]', text):
      yield from (line[i : i + LONGEST_PIECE] for i in range(0, len(line), LONGEST_PIECE))
