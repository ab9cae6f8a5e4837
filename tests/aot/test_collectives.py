"""What eight chips of a v5e exchange in a training step, and where, read from the compiled program.

With remat the layers are a loop, forward and backward; attention is a kernel in it. XLA may make
loops of its own where it gathers a weight piece by piece into a product (windowed_dot_general).
"""

import collections
import math
import re

import jax
import pytest
from flax import nnx
from programs import VOCAB, compiled_step, config_of
from test_tpu import v5e

from mla import sharding
from mla.model import make_model

# No weight has an axis of this length, so that an array with it is an activation.
LENGTH = 640
SIZES = {'d_model': 256, 'num_heads': 8, 'ffn_dim': 512, 'seq_len': LENGTH, 'batch_size': 16}
MOVES = 'all-gather|all-to-all|collective-permute'
EXCHANGE = re.compile(rf'= (.*?) ({MOVES}|all-reduce|reduce-scatter)(?:-start)?\(')


class Program:
  """A compiled program's computations, the loops each is in, and its lines."""

  def __init__(self, text: str):
    self.lines = collections.defaultdict(list)
    self.callers = collections.defaultdict(set)
    self.bodies = set()
    name = ''
    for line in text.splitlines():
      if line.endswith('{') and not line.startswith(' '):
        name = re.match(r'(?:ENTRY )?%?([\w.-]+)', line)[1]
      self.lines[name].append(line)
      for role, called in re.findall(r'(body|condition|calls|to_apply)=%?([\w.-]+)', line):
        self.callers[called].add(name)
        if role == 'body':
          self.bodies.add(called)

  def loops(self, name: str) -> list[str]:
    """The bodies of loops that a computation runs in, from itself outwards."""
    mine = [name] if name in self.bodies else []
    return mine + max((self.loops(caller) for caller in self.callers[name]), key=len, default=[])

  def exchanges(self):
    """(bodies of loops it is in, kind, sizes of each array that comes out) of each exchange.

    One that overlaps with a loop is told where it starts only.
    """
    for name, lines in self.lines.items():
      if name.startswith('async_collective_fusion'):
        continue
      for line in lines:
        if found := EXCHANGE.search(line):
          arrays = [
            tuple(map(int, filter(None, sizes.split(','))))
            for sizes in re.findall(r'\w\d+\[([\d,]*)\]', found[1])
          ]
          yield self.loops(name), found[2], arrays


@pytest.mark.parametrize(
  ('arm', 'sizes'),
  [
    ('mla', (1, 8, 1)),
    ('mla', (1, 4, 2)),
    ('mla', (2, 2, 2)),
    ('gqa', (2, 1, 4)),  # two key heads for four devices
    ('mqa', (1, 2, 4)),
  ],
)
def test_layers_gather_their_own_weights_and_attention_nothing(arm, sizes):
  config = config_of(arm, remat='latents', **SIZES)
  mesh = v5e(*sizes)
  program = Program(compiled_step(config, mesh).as_text())
  layers = {
    name for name, lines in program.lines.items() if any('splash_m' in line for line in lines)
  } & program.bodies
  assert len(layers) == 2  # forward and backward
  for body in program.bodies - layers:  # in a layer there is no other loop but those of a weight
    assert not layers & set(program.loops(body)) or 'windowed_dot_general' in body

  blocks = nnx.state(nnx.eval_shape(lambda: make_model(config, VOCAB)).blocks)
  places = jax.tree.leaves(sharding.shardings(blocks, mesh))
  weights = list(zip(jax.tree.leaves(blocks), places, strict=True))
  assert all(LENGTH not in leaf.shape for leaf, _ in weights)
  largest = max(leaf.size for leaf, _ in weights) // config.num_layers
  split = {leaf.size for leaf, place in weights if not place.is_fully_replicated}
  for loops, kind, arrays in program.exchanges():
    for array in arrays:
      if loops and kind in MOVES:
        assert LENGTH not in array, f'{kind} of an activation in a loop: {array}'
        assert math.prod(array) <= largest, f'{kind} of more than a layer: {array}'
      elif kind == 'all-gather' and array and array[0] == config.num_layers:
        assert math.prod(array) not in split, f'all layers of a weight at once: {array}'
