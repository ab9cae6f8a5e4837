"""What devices exchange in a training step, read from the compiled program."""

import functools
import math
import re
import uuid

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of, tiny_config
from flax import nnx

from mla import loss, sharding
from mla import step as step_lib
from mla.model import make_model
from mla.optimizer import make_optimizer

VOCAB = 80
OPERATION = re.compile(
  r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
SIZES = {'d_model': 64, 'ffn_dim': 96, 'num_heads': 8, 'head_dim': 8, 'value_head_dim': 8}


def exchanges(program: str) -> list[tuple[bool, str, str]]:
  """Of each: whether it is outside of all loops, its kind, and the shapes that come out of it."""
  found, outside = [], False
  for line in program.splitlines():
    if line.endswith('{'):
      outside = line.startswith('ENTRY')
    for shapes, kind in OPERATION.findall(line):
      found.append((outside, kind, shapes))
  return found


def compile_step(shape: tuple[int, int, int], options: dict | None = None, **changes):
  """The training step on a mesh of this shape, not run."""
  config = tiny_config('mla', **SIZES, rope_dim=8, remat='latents', **changes)
  mesh = mesh_of(shape)
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    create = functools.partial(step_lib.init_state, config, VOCAB, optimizer)
    placement = sharding.shardings(jax.eval_shape(create), mesh)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, VOCAB)))

    def step(state, tokens):
      return step_lib.train_step(config, graphdef, optimizer, state, tokens)

    def place(leaf, where):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    step.__name__ = f'step_{uuid.uuid4().hex}'  # no cache has it
    state = jax.tree.map(place, jax.eval_shape(create), placement)
    rows = jax.NamedSharding(mesh, jax.P(sharding.RULES['B']))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32, sharding=rows)
    lowered = jax.jit(step, out_shardings=(placement, None)).lower(state, tokens)
    return lowered.compile(compiler_options=options)


@pytest.mark.parametrize('chunk', [loss.CHUNK_BYTES, 4 * VOCAB * 8])
def test_accumulated_gradients_are_exchanged_once_a_step(chunk, monkeypatch):
  monkeypatch.setattr(loss, 'CHUNK_BYTES', chunk)
  step = compile_step((8, 1, 1), accumulation_steps=2, batch_size=16)
  assert [found[:2] for found in exchanges(step.as_text())] == [(True, 'all-reduce')]


def test_the_vocabularys_gradients_are_never_summed_whole(monkeypatch):
  """Each device gets its part of D of what fsdp sums, and data's sum is of that part only."""
  monkeypatch.setattr(loss, 'CHUNK_BYTES', 4 * VOCAB * 8)
  found = exchanges(compile_step((2, 2, 2)).as_text())
  part, width = VOCAB // 2, SIZES['d_model']
  scattered = [shape for _, kind, shape in found if kind == 'reduce-scatter']
  for sizes in (f'[{part},{width // 2}]', f'[{width // 2},{part}]'):  # the embedding's, w_out's
    assert sum(sizes in shape for shape in scattered) == 1, scattered
  summed = ' '.join(shape for _, kind, shape in found if kind == 'all-reduce')
  assert not re.search(rf'\[({VOCAB}|{part}),{width}\]|\[{width},({VOCAB}|{part})\]', summed)


def test_weights_are_gathered_as_bfloat16_where_that_computes(tmp_path, monkeypatch):
  """Read where the program has just been split, as XLA's CPU backend widens bfloat16 later on."""
  monkeypatch.setattr(loss, 'CHUNK_BYTES', 4 * VOCAB * 8)
  options = {'xla_dump_to': str(tmp_path), 'xla_dump_hlo_pass_re': 'spmd.*'}
  compile_step((2, 4, 1), options, dtype='bfloat16')
  (path,) = tmp_path.glob('*after_spmd-partitioning*')
  gathered = {'bf16': set(), 'f32': set(), 's32': set()}
  for _, kind, shape in exchanges(path.read_text(encoding='utf-8')):
    if kind == 'all-gather':
      dtype, sizes = re.match(r'(\w+)\[([\d,]*)', shape).groups()
      gathered[dtype].add(math.prod(map(int, sizes.split(','))))
  model = nnx.eval_shape(lambda: make_model(tiny_config('mla', **SIZES, rope_dim=8), VOCAB))
  split = {
    math.prod(size for size, axis in zip(leaf.shape, axes, strict=True) if axis != 'L')
    for _, leaf in nnx.to_flat_state(nnx.state(model))
    if 'D' in (axes := leaf.get_metadata('axes')) and len(leaf.shape) > 1 + ('L' in axes)
  }
  assert split <= gathered['bf16'] and not split & gathered['f32']
