"""Probes: tasks in which what a cache keeps is all that counts, in place of text.

On text at short contexts local statistics carry a model, so a loss hardly tells what its cache
forgot. A probe is made to tell: values are drawn at random, stand at few positions, and are asked
for later, so that no more can be right than the cache has kept. `data.dataset=probe:NAME` names one
of PROBES; `data.records`, `data.attributes` and `data.alphabet` say its size, `seq_len` how long a
window is.

Windows are drawn, never stored: each from (the run's seed, its number in the stream), so that any
process can make any of them, and a stream's position is one number. No training window comes twice;
those that are held out are of a seed that no run can have, and the same for all of them. The form
of a window is told in mla/windows.py.

What is measured is *accuracy*, the share of queries whose value got the largest logit, and *bits
recalled*: values are right with chance p and else as good as drawn, so that each gives back what
a channel of A symbols with symmetric errors carries, log2 A - h(p) - (1 - p) log2(A - 1) bits
(Cover and Thomas, Elements of Information Theory, 7.2), times the values of a window.
"""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mla.errors import UserError
from mla.fields import field
from mla.windows import NONE

PREFIX = 'probe:'
VERSION = 1  # of how windows are drawn; raise it where they become others
HELD_OUT = 1024  # validation windows
HELD_OUT_SEED = 2**32  # above what config.seed can be
KEYS = 2  # keys there are, for each that a window uses

Rule = tuple[bool, str, str]  # whether it holds, the field, the cure


@dataclasses.dataclass(frozen=True)
class Probe(abc.ABC):
  """A task of a size; its kinds say what their windows hold."""

  records: int
  attributes: int
  alphabet: int
  length: int  # T

  name: ClassVar[str]

  @property
  @abc.abstractmethod
  def vocab(self) -> int:
    """Tokens there are."""

  @property
  def parts(self) -> int:
    """Tokens that a position may read at once."""
    return 1

  @property
  def queries(self) -> int:
    """Targets of a window."""
    return self.records

  def rules(self) -> Iterator[Rule]:
    """What its sizes must keep, each with the field that breaks it and the cure."""
    yield self.attributes == 1, 'data.attributes', f'{self.name} has one value a record: set 1'

  @abc.abstractmethod
  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'T row']:
    """One window."""

  @property
  def answers(self) -> int:
    """Those among which a query is guessed: right with 1 / answers."""
    return self.alphabet

  def bits_held(self) -> float:
    """Bits of all values of a window."""
    return self.records * self.attributes * math.log2(self.alphabet)

  def bits_recalled(self, accuracy: float) -> float:
    """Bits of a window's values that come back where this share of the answers is right.

    The share that a symmetric channel of as many answers lets through.
    """
    n, p = self.answers, accuracy
    if p <= 1 / n:
      return 0.0
    wrong = 0.0 if p >= 1 else -p * math.log2(p) - (1 - p) * math.log2((1 - p) / (n - 1))
    return self.bits_held() * (1 - wrong / math.log2(n))

  def _empty(self) -> Int[np.ndarray, 'T row']:
    return np.full((self.length, self.parts + 1), NONE, np.int32)


class Payload(Probe):
  """Payload recall: how many bits a position's cache gives back.

  A record is one position: a key and m values, one for each attribute, each of an alphabet of A;
  the position's input is the sum of their embeddings. The records stand first, in any order; every
  later position asks one, (key, attribute), for its value there. Keys differ within a window,
  values are independent and uniform.

  It must show a knee: to answer all, a position must keep m log2 A bits, which no way of attending
  can make up for. Sharing and shrinking of heads, and latents, are then compared at equal bytes,
  and the knee must move with m log2 A, or it is not the cache that binds. Positions tell nothing
  here. Ours; associative recall with one value a key, over plain tokens, is Mqar.
  """

  name = 'payload'

  @property
  def vocab(self) -> int:
    return KEYS * self.records + self.attributes * (1 + self.alphabet)

  @property
  def parts(self) -> int:
    return 1 + self.attributes

  @property
  def queries(self) -> int:
    return self.length - self.records

  def rules(self) -> Iterator[Rule]:
    yield _more_than(self.length, self.records)

  def asking(self, attribute: np.ndarray) -> np.ndarray:
    """The tokens that ask for attributes."""
    return KEYS * self.records + attribute

  def token(self, attribute: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The tokens of values; an attribute's are its own."""
    return KEYS * self.records + self.attributes + attribute * self.alphabet + value

  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'T row']:
    R, m, window = self.records, self.attributes, self._empty()
    keys = rng.permutation(KEYS * R)[:R]
    tokens = self.token(np.arange(m), rng.integers(self.alphabet, size=(R, m)))
    window[:R, 0], window[:R, 1 : 1 + m] = keys, tokens
    record, attribute = rng.integers(R, size=self.queries), rng.integers(m, size=self.queries)
    window[R:, 0], window[R:, 1] = keys[record], self.asking(attribute)
    window[R:, -1] = tokens[record, attribute]
    return window


class MultiKey(Payload):
  """Multi-key recall: records found by any of their values.

  A record is one position with m values, as Payload's, and no key; no two records of a window have
  the same value of an attribute. A query holds a value of one attribute and asks for that of
  another: (attribute i's value, attribute j) -> the record's value of attribute j.

  What must be kept is the same as Payload's, but now the *keys* must tell the records apart in m
  ways, so that a key needs room for all m values beside those in the value. It must show what
  sharing costs: one head's keys (MQA) have to hold what several heads' could divide among them,
  while of a latent keys and values are made from the same numbers. Ours; DeepSeek-V2 (arXiv
  2405.04434) claims for its latent that it keeps what all heads' keys and values need.
  """

  name = 'multikey'

  @property
  def parts(self) -> int:
    return self.attributes

  @property
  def vocab(self) -> int:
    return super().vocab - KEYS * self.records

  def rules(self) -> Iterator[Rule]:
    yield _more_than(self.length, self.records)
    cure = 'a record is found by one attribute and asked for another: set 2 or more'
    yield self.attributes > 1, 'data.attributes', cure
    cure = f'no two of data.records={self.records} may share a value: set as many or more'
    yield self.alphabet >= self.records, 'data.alphabet', cure
    yield self.records > 1, 'data.records', 'of one record there is nothing to find: set 2 or more'

  @property
  def answers(self) -> int:
    """The values that stand in the window: no two records have the same."""
    return self.records

  def bits_held(self) -> float:
    """Fewer than Payload's: no value is drawn twice, and which record stands first is not asked."""
    left = range(self.alphabet - self.records + 1, self.alphabet + 1)
    orders = math.lgamma(self.records + 1) / math.log(2)
    return self.attributes * sum(map(math.log2, left)) - orders

  def asking(self, attribute: np.ndarray) -> np.ndarray:
    return attribute

  def token(self, attribute: np.ndarray, value: np.ndarray) -> np.ndarray:
    return self.attributes + attribute * self.alphabet + value

  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'T row']:
    R, m, window = self.records, self.attributes, self._empty()
    orders = np.stack([rng.permutation(self.alphabet)[:R] for _ in range(m)], axis=1)
    tokens = self.token(np.arange(m), orders)
    window[:R, :m] = tokens
    record, known = rng.integers(R, size=self.queries), rng.integers(m, size=self.queries)
    asked = (known + rng.integers(1, m, size=self.queries)) % m
    window[R:, 0], window[R:, 1] = tokens[record, known], self.asking(asked)
    window[R:, -1] = tokens[record, asked]
    return window


class Copy(Probe):
  """Copying: `records` symbols of an alphabet of A, a mark, and the same again, each asked for.

  A position has to keep log2 A bits and be found by its place or by what stood before it. It must
  show that position survives in the cache: MLA keeps it in its few rotary numbers. Any width of
  latent should solve it (a selective copy without gaps, as in Jelassi et al. 2024, arXiv
  2402.01032, where attention copies what a fixed state cannot).
  """

  name = 'copy'

  @property
  def vocab(self) -> int:
    return self.alphabet + 1

  def rules(self) -> Iterator[Rule]:
    yield from super().rules()
    cure = f'seq_len={self.length} is to be twice that: set {max(1, self.length // 2)}'
    yield 2 * self.records == self.length, 'data.records', cure

  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'T row']:
    R, window = self.records, self._empty()
    symbols = rng.integers(self.alphabet, size=R)
    window[:R, 0], window[R, 0], window[R + 1 :, 0] = symbols, self.alphabet, symbols[:-1]
    window[R:, -1] = symbols
    return window


class Mqar(Probe):
  """Multi-query associative recall (zoology; Arora et al. 2023, arXiv 2312.04927, section 3).

  `records` pairs of a key and a value, two positions each, then every key once more, in any order
  and at gaps that follow a power law (exponent 0.01 - 1, so that most are asked early); at each the
  target is its value. Blanks fill the rest, where zoology's code puts random tokens.

  Attention solves it whatever its width, with a layer that moves a key beside its value and one
  that looks it up. So it must show no knee: it checks that things work.
  """

  name = 'mqar'
  POWER = 0.01  # zoology's power_a

  @property
  def vocab(self) -> int:
    return KEYS * self.records + self.alphabet + 1

  def rules(self) -> Iterator[Rule]:
    yield from super().rules()
    cure = f'seq_len={self.length} has room for {self.length // 4}: set that, or a longer seq_len'
    yield 4 * self.records <= self.length, 'data.records', cure

  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'T row']:
    R, window = self.records, self._empty()
    keys = rng.permutation(KEYS * R)[:R]
    values = KEYS * R + rng.integers(self.alphabet, size=R)
    window[:, 0] = self.vocab - 1
    window[: 2 * R : 2, 0], window[1 : 2 * R : 2, 0] = keys, values
    weights = np.arange(1, (self.length - 2 * R) // 2 + 1) ** (self.POWER - 1)
    places = rng.choice(len(weights), R, replace=False, p=weights / weights.sum())
    record = rng.permutation(R)
    window[2 * R + 2 * places, 0] = keys[record]
    window[2 * R + 2 * places, -1] = values[record]
    return window


def _more_than(length: int, records: int) -> Rule:
  cure = f'seq_len={length} holds the records and the queries: set fewer, or a longer seq_len'
  return records < length, 'data.records', cure


PROBES: dict[str, type[Probe]] = {kind.name: kind for kind in (Payload, MultiKey, Copy, Mqar)}


def asked(config: ConfigDict) -> bool:
  """Whether a config is of a probe, not of text."""
  return config.data.dataset.startswith(PREFIX)


def parse(config: ConfigDict) -> Probe | None:
  """The probe that data.dataset names, None for text; UserError for a rule that it breaks."""
  data = config.data
  if not asked(config):
    return None
  name = data.dataset.removeprefix(PREFIX)
  if name not in PROBES:
    choices = ', '.join(f'{PREFIX}{name}' for name in PROBES)
    raise UserError(f'data.dataset={data.dataset}: no such probe; choose one of {choices}')
  probe = PROBES[name](data.records, data.attributes, data.alphabet, config.seq_len)
  for rule in (*_no_text(data), *_sizes(probe), *probe.rules()):
    holds, broken, cure = rule
    if not holds:
      raise UserError(f'{broken}={field(config, broken)}: {cure}')
  return probe


def _no_text(data: ConfigDict) -> Iterator[Rule]:
  cure = f'{data.dataset} reads no text; leave it out'
  yield data.tokenizer == 'bytes', 'data.tokenizer', cure
  for name in ('files', 'validation_files', 'packing'):
    yield not data[name], f'data.{name}', cure


def _sizes(probe: Probe) -> Iterator[Rule]:
  yield probe.alphabet > 1, 'data.alphabet', 'of one value none can be forgotten: set 2 or more'
  small = probe.vocab <= 2**20
  yield small, 'data.alphabet', f'gives {probe.vocab:,} tokens, and 1,048,576 are the most'


class Symbols(NamedTuple):
  """A probe's tokens, where text has a tokenizer."""

  vocab_size: int
  digest: str


class Stream(NamedTuple):
  """Windows of a probe by their numbers."""

  probe: Probe
  held_out: bool

  def amount(self) -> str:
    """What it is, for people."""
    probe = self.probe
    held = f'{probe.records} records of {probe.attributes} x log2 {probe.alphabet} bits'
    return f'{probe.name}: {held} a window, {probe.queries} of its {probe.length} tokens ask'

  def window(self, index: int, seed: int = 0) -> Int[np.ndarray, 'T row']:
    """Window `index` of what `seed` draws; of held-out ones the seed is theirs."""
    key = np.array([HELD_OUT_SEED if self.held_out else seed, index], np.uint64)
    return self.probe.draw(np.random.Generator(np.random.Philox(key=key)))


def symbols(probe: Probe) -> Symbols:
  identity = f'{PREFIX}{probe.name} {VERSION} {dataclasses.astuple(probe)}'
  return Symbols(probe.vocab, hashlib.sha256(identity.encode()).hexdigest())
