"""How rotation is stretched to contexts longer than a model was first trained on.

The config's rope_scaling is none, or a kind and its numbers, those with a default may be left out:

  yarn:factor=40,original=4096[,beta_fast=32][,beta_slow=1][,mscale=1][,mscale_all_dim=0]
  llama3:factor=8,original=8192,low=1,high=4
"""

import math
import re
from typing import NamedTuple

import numpy as np

from mla.errors import UserError

# What each kind needs, and its defaults.
KINDS: dict[str, dict[str, float | None]] = {
  'none': {},
  'yarn': {
    'factor': None,
    'original': None,
    'beta_fast': 32.0,
    'beta_slow': 1.0,
    'mscale': 1.0,
    'mscale_all_dim': 0.0,
  },
  'llama3': {'factor': None, 'original': None, 'low': None, 'high': None},
}


class Scaling(NamedTuple):
  """A kind and its numbers by name."""

  kind: str
  numbers: dict[str, float]

  def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
    """Radians a token of each pair, of the unscaled ones base^(-2i/R), float64."""
    if self.kind == 'yarn':
      return _yarn(plain, base, **self.numbers)
    if self.kind == 'llama3':
      return _llama3(plain, **self.numbers)
    return plain

  def amplitude(self) -> float:
    """The factor of cos and sin."""
    if self.kind != 'yarn':
      return 1.0
    factor, own, all_dims = (self.numbers[n] for n in ('factor', 'mscale', 'mscale_all_dim'))
    return _mscale(factor, own) / _mscale(factor, all_dims)

  def sharpness(self) -> float:
    """The factor of MLA's scores, those without position included."""
    if self.kind != 'yarn':
      return 1.0
    return _mscale(self.numbers['factor'], self.numbers['mscale_all_dim']) ** 2


def parse(text: str) -> Scaling:
  """The config's rope_scaling; UserError that says how it is written."""
  kind, _, rest = text.partition(':')
  if kind not in KINDS:
    raise UserError(f'rope_scaling={text}: choose one of {", ".join(KINDS)}')
  known = KINDS[kind]
  found: dict[str, float] = {}
  for part in rest.split(',') if rest else []:
    name, _, number = part.partition('=')
    if name not in known or name in found or not re.fullmatch(r'\d+(\.\d+)?(e[-+]?\d+)?', number):
      raise UserError(f'rope_scaling={text}: {part!r} does not fit; {_spelling(kind)}')
    found[name] = float(number)
  numbers = {name: found.get(name, default) for name, default in known.items()}
  given = {name: number for name, number in numbers.items() if number is not None}
  if len(given) < len(known):
    raise UserError(f'rope_scaling={text}: lacks a number; {_spelling(kind)}')
  if kind != 'none':
    _check(text, given)
  return Scaling(kind, given)


def spell(kind: str, numbers: dict[str, float]) -> str:
  """What parse() reads."""
  parts = (f'{name}={float(number)!r}'.removesuffix('.0') for name, number in numbers.items())
  return f'{kind}:{",".join(parts)}'


def _spelling(kind: str) -> str:
  return f'write {kind}:' + ','.join(
    f'{name}={default if default is not None else "NUMBER"}'
    for name, default in KINDS[kind].items()
  )


def _check(text: str, numbers: dict[str, float]) -> None:
  if not all(math.isfinite(number) for number in numbers.values()):
    raise UserError(f'rope_scaling={text}: its numbers must be finite')
  if numbers['factor'] < 1 or numbers['original'] < 1:
    raise UserError(f'rope_scaling={text}: factor and original must be at least 1')
  if numbers.get('high', 1) <= numbers.get('low', 0):
    raise UserError(f'rope_scaling={text}: high must be above low')
  if numbers.get('beta_fast', 2) <= numbers.get('beta_slow', 1):
    raise UserError(f'rope_scaling={text}: beta_fast must be above beta_slow')
  if numbers.get('beta_slow', 1) <= 0:
    raise UserError(f'rope_scaling={text}: beta_slow must be positive')


def _mscale(factor: float, weight: float) -> float:
  return 0.1 * weight * math.log(factor) + 1.0


def _yarn(
  plain: np.ndarray,
  base: float,
  factor: float,
  original: float,
  beta_fast: float,
  beta_slow: float,
  **_: float,
) -> np.ndarray:
  """Pairs that turn more than beta_fast times within the original context stay, those that turn
  less than beta_slow times are slowed by `factor`, with a ramp between (Peng et al. 2023, arXiv
  2309.00071, section 3.2; the ramp's ends rounded as in its code)."""
  dims = 2 * len(plain)

  def pair_that_turns(times: float) -> float:
    return dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

  low = max(math.floor(pair_that_turns(beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(beta_slow)), dims - 1)
  ramp = np.clip((np.arange(len(plain)) - low) / (max(high - low, 0) or 0.001), 0, 1)
  return plain / factor * ramp + plain * (1 - ramp)


def _llama3(
  plain: np.ndarray, factor: float, original: float, low: float, high: float
) -> np.ndarray:
  """Pairs that turn more than `high` times within the original context stay, those that turn less
  than `low` times are slowed by `factor`, with a ramp between (Llama 3.1's model card and code)."""
  turns = original * plain / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return plain / factor * (1 - kept) + plain * kept
