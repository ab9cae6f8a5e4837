"""What a program will do, read from it before it runs: FLOPs from its jaxpr, bytes between devices
from its compiled text. Loops are multiplied out, which XLA's own count does not do.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core


class Flops(NamedTuple):
  """Of matrix products, everything else being small beside them."""

  known: float  # in loops whose number of turns the jaxpr knows, and in none
  turn: float  # in one turn of each `while` loop, of which it does not

  def __add__(self, other: Any) -> 'Flops':
    return Flops(self.known + other.known, self.turn + other.turn)

  def times(self, turns: float) -> 'Flops':
    return Flops(self.known * turns, self.turn * turns)


def flops(jaxpr: core.Jaxpr) -> Flops:
  """The products' FLOPs, 2 a multiplication and addition; of a conditional its costliest branch."""
  total = Flops(0, 0)
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += Flops(2 * equation.outvars[0].aval.size * math.prod(sizes), 0)
    elif name == 'cond':
      total += max(flops(branch.jaxpr) for branch in params['branches'])
    elif name == 'while':
      total += Flops(0, sum(flops(params['body_jaxpr'].jaxpr)))
    else:
      turns = params['length'] if name == 'scan' else 1
      for inner in _inner(params):
        total += flops(inner).times(turns)
  return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Of what stands in a compiled program: names for what is there already.
NO_ARRAYS = 'parameter constant tuple get-tuple-element bitcast while conditional call'.split()
BYTES = {'pred': 1, 'token': 0, 'bf16': 2, 'opaque': 0}


class Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  line: str

  @property
  def nbytes(self) -> int:
    """Of its result, all parts of a tuple together."""
    return sum(_array_bytes(*found) for found in re.findall(r'([a-z]\w*)\[([\d,]*)\]', self.type))

  @property
  def origin(self) -> str:
    """The JAX operation it comes from, or its own name."""
    found = re.search(r'op_name="([^"]*)"', self.line)
    return found[1] if found else self.name


class Program:
  """A compiled program's text (HLO), taken apart."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ''
    current: list[Instruction] = []
    for line in text.splitlines():
      header = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if header and not line.startswith(('HloModule', ' ')):
        current = self.computations.setdefault(header[2], [])
        self.entry = header[2] if header[1] else self.entry
        continue
      found = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\(', line)
      if found:
        current.append(Instruction(found[1], found[2], found[3], line))

  def turns(self) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs in one run of the program, and those within a fusion.

    A `while` whose number of turns the compiler does not know counts once.
    """
    runs: dict[str, int] = collections.Counter()
    fused: set[str] = set()
    waiting = [(self.entry, 1, False)]
    while waiting:
      name, times, inside = waiting.pop()
      runs[name] += times
      if inside:
        fused.add(name)
      for instruction in self.computations.get(name, []):
        if instruction.opcode.endswith(('-done', '-update')):
          continue  # of what began with a -start
        turns = 1
        if instruction.opcode == 'while':
          known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.line)
          turns = int(known[1]) if known else 1
        fusion = inside or instruction.opcode == 'fusion'
        for called in _called(instruction.line):
          waiting.append((called, times * turns, fusion))
    return runs, fused

  def collective_bytes(self) -> dict[str, float]:
    """{kind: bytes that a device sends in one run}, with each collective as a ring would do it."""
    runs, _ = self.turns()
    sent: dict[str, float] = collections.Counter()
    for name, instructions in self.computations.items():
      for instruction in instructions:
        kind = instruction.opcode.removesuffix('-start')
        if kind in COLLECTIVES and runs.get(name):
          sent[kind] += runs[name] * _sent(kind, instruction)
    return dict(sent)

  def custom_calls(self) -> collections.Counter[str]:
    """{target: how many stand in the text}: the kernels that XLA did not make itself."""
    return collections.Counter(
      found[1]
      for instructions in self.computations.values()
      for instruction in instructions
      if (found := re.search(r'custom_call_target="([^"]+)"', instruction.line))
    )

  def largest(self, count: int) -> list[tuple[int, str, str]]:
    """(bytes, type, origin) of the largest arrays that the program makes, each type once."""
    runs, fused = self.turns()
    found: dict[str, tuple[int, str, str]] = {}
    for name, instructions in self.computations.items():
      if name in fused or not runs.get(name):
        continue
      for instruction in instructions:
        if instruction.opcode not in NO_ARRAYS and not instruction.type.startswith('('):
          plain = instruction.type.split('{')[0]
          found.setdefault(plain, (instruction.nbytes, plain, instruction.origin))
    return sorted(found.values(), reverse=True)[:count]


def _array_bytes(dtype: str, sizes: str) -> int:
  elements = math.prod(int(size) for size in sizes.split(',') if size)
  if dtype in BYTES:
    return elements * BYTES[dtype]
  bits = re.search(r'\d+', dtype)
  return elements * int(bits[0]) // 8 if bits else 0


def _called(line: str) -> Iterator[str]:
  for group, single in re.findall(
    r'(?:calls|body|condition|branch_computations|called_computations|to_apply)='
    r'(?:\{([^}]*)\}|%?([\w.\-]+))',
    line,
  ):
    yield from (name.strip().lstrip('%') for name in (group or single).split(','))


def _sent(kind: str, instruction: Instruction) -> float:
  members, size = _group(instruction.line), float(instruction.nbytes)
  if instruction.opcode.endswith('-start') and kind == 'all-gather':  # its part, and the whole
    size *= members / (members + 1)
  if kind == 'collective-permute':
    return size / 2 if instruction.opcode.endswith('-start') else size
  share = (members - 1) / members
  return {
    'all-gather': size * share,
    'all-reduce': 2 * size * share,
    'reduce-scatter': size * (members - 1),  # of its result, a part of what is reduced
    'all-to-all': size * share,
  }[kind]


def _group(line: str) -> int:
  """How many devices take part in a collective together."""
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  if listed:
    return len(listed[1].split(','))
  counted = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  return int(counted[1]) if counted else 1
