"""What a compiled program will do, read from its text (XLA's HLO): loops and their turns, bytes
between devices, kernels, and the largest arrays.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
  def operands(self) -> list[str]:
    given = self.line.split(f' {self.opcode}(', 1)[1].split(')', 1)[0]
    return re.findall(r'%?([\w.\-]+)(?:,|$)', re.sub(r'/\*.*?\*/', '', given))

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
    partitions = re.search(r'num_partitions=(\d+)', text)
    self.devices = int(partitions[1]) if partitions else 1
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
        turns = self._turns(name, instruction) if instruction.opcode == 'while' else 1
        fusion = inside or instruction.opcode == 'fusion'
        for called in _called(instruction.line):
          waiting.append((called, times * turns, fusion))
    return runs, fused

  def collective_bytes(self) -> dict[str, float]:
    """{kind: bytes that a device sends in one run}, with each collective as a ring would do it.

    One that is spread over several fusions, to run beside what they compute, counts as often as
    the one that runs least, where it begins.
    """
    runs, fused = self.turns()
    sent: dict[tuple[str, str], float] = {}
    for name, instructions in self.computations.items():
      for instruction in instructions:
        kind = instruction.opcode.removesuffix('-start')
        if kind in COLLECTIVES and runs.get(name):
          channel = re.search(r'channel_id=\d+', instruction.line)
          key = channel[0] if channel and name in fused else f'{name} {instruction.name}'
          size = runs[name] * _sent(kind, instruction, self.devices)
          if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
            kind, size = 'reduce-scatter', size / 2  # on a TPU; each keeps its part of the sum
          sent[kind, key] = min(sent.get((kind, key), size), size)
    kinds = sorted({kind for kind, _ in sent})
    return {kind: sum(size for (its, _), size in sent.items() if its == kind) for kind in kinds}

  def _turns(self, name: str, loop: Instruction) -> int:
    """Of a `while` in the computation `name`: what the compiler noted, or else the range of its
    counter, if that begins, ends and grows by what is constant; otherwise 1."""
    noted = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.line)
    if noted:
      return int(noted[1])
    test, body = (
      {instruction.name: instruction for instruction in self.computations.get(part, [])}
      for key in ('condition', 'body')
      for part in re.findall(rf'{key}=%?([\w.\-]+)', loop.line)
    )
    outside = {instruction.name: instruction for instruction in self.computations[name]}
    carried = outside[loop.operands[0]].operands if loop.operands[0] in outside else []

    def source(within: dict[str, Instruction], value: str) -> Instruction | None:
      """What makes the value, copies aside."""
      made = within.get(value)
      while made is not None and made.opcode in ('copy', 'bitcast', 'convert'):
        made = within.get(made.operands[0])
      return made

    def place(within: dict[str, Instruction], value: str) -> int | None:
      """Which part of the loop's state the value is."""
      made = source(within, value)
      if made is None or made.opcode != 'get-tuple-element':
        return None
      return int(re.findall(r'index=(\d+)', made.line)[0])

    def constant(within: dict[str, Instruction], value: str) -> int | None:
      part = None if within is outside else place(within, value)
      if part is not None:
        return constant(outside, carried[part]) if part < len(carried) else None
      made = source(within, value)
      known = made is not None and made.opcode == 'constant'
      return int(made.operands[0]) if made and known else None

    last = next((i for i in test.values() if i.line.lstrip().startswith('ROOT')), None)
    state = next((i for i in body.values() if i.line.lstrip().startswith('ROOT')), None)
    if last is None or state is None or 'direction=LT' not in last.line:
      return 1
    counter, end = place(test, last.operands[0]), constant(test, last.operands[1])
    if counter is None or end is None or counter >= len(state.operands):
      return 1
    start = constant(outside, carried[counter]) if counter < len(carried) else None
    grown = body.get(state.operands[counter])
    added = grown.operands if grown else []
    steps = [constant(body, value) for value in added if place(body, value) != counter]
    by = steps[0] if len(steps) == 1 else None
    return -(-(end - (start or 0)) // by) if by and grown and grown.opcode == 'add' else 1

  def custom_calls(self) -> collections.Counter[str]:
    """{target: how many stand in the text}: the kernels that XLA did not make itself."""
    return collections.Counter(
      found[1]
      for instructions in self.computations.values()
      for instruction in instructions
      if (found := re.search(r'custom_call_target="([^"]+)"', instruction.line))
    )

  def largest(self, count: int) -> list[tuple[int, str, str]]:
    """(bytes, type, origin) of the largest arrays that the program makes, each type once.

    The origin is the JAX operation, or where the compiler tells none of that type its own name.
    """
    runs, fused = self.turns()
    found: dict[str, tuple[int, str, str]] = {}
    named: set[str] = set()
    for name, instructions in self.computations.items():
      if name in fused or not runs.get(name):
        continue
      for instruction in instructions:
        if instruction.opcode in NO_ARRAYS or instruction.type.startswith('('):
          continue
        plain, tells = instruction.type.split('{')[0], 'op_name=' in instruction.line
        if plain not in found or (tells and plain not in named):
          found[plain] = (instruction.nbytes, plain, instruction.origin)
        if tells:
          named.add(plain)
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


def _sent(kind: str, instruction: Instruction, everyone: int) -> float:
  """Bytes that a device sends for one collective in a ring."""
  members, whole = _group(instruction.line, everyone), float(instruction.nbytes)
  if kind == 'collective-permute' and instruction.opcode.endswith('-start'):
    whole -= 4 * instruction.type.count('u32[]')  # its handles
  if instruction.opcode.endswith('-start') and kind != 'all-reduce':  # what goes in, and comes out
    split = kind in ('all-gather', 'reduce-scatter')
    whole *= members / (members + 1) if split else 1 / 2
  elif kind == 'reduce-scatter':  # a device's part comes out
    whole *= members
  if kind == 'collective-permute':
    return whole
  return whole * (members - 1) / members * (2 if kind == 'all-reduce' else 1)


def _group(line: str, everyone: int) -> int:
  """How many devices take part in a collective together; without a list of them, everyone."""
  named = re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # of some only a part
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  if listed:
    return len(listed[1].split(','))
  counted = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  return int(counted[1]) if counted else everyone
