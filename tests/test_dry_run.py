"""Dry runs against the compiler's own figures, formulas, and programs whose counts are known."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, tiny_config
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mla import cost, dry_run, hlo, sharding, targets
from mla.attention import make_attention
from mla.errors import UserError
from mla.model import count_params, make_model
from mla.optimizer import make_optimizer
from mla.step import init_state, train_step
from mla.sweep import dry_sweep, trials

CONTRACT = (
  'target devices fits params_total argument_bytes_per_device temporary_bytes_per_device '
  'hbm_bytes_per_device flops_per_token collective_bytes_per_step step_seconds_at_least bound_by '
  'kernels'
).split()
SPLIT = {'mesh__data': 1, 'mesh__fsdp': 4, 'mesh__tensor': 2}
CHIP = targets.Chip(memory=2**30, flops=1e12, bandwidth=1e11, links=1e10)


def machine(devices: int, chip: targets.Chip = CHIP) -> targets.Target:
  return targets.Target('test', chip, jax.devices()[:devices])


def test_memory_is_the_compilers():
  """Against a step compiled here."""
  config = tiny_config('mla', num_layers=1, **SPLIT)
  report = dry_run.measure(config, machine(8), context=100, batch=5)
  assert set(CONTRACT) <= set(report)
  json.dumps(report)
  mesh = sharding.make_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(config)
    create = functools.partial(init_state, config, 257, optimizer)
    placement = sharding.shardings(jax.eval_shape(create), mesh)
    state = sharding.placed(jax.eval_shape(create), placement)
    rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    batch = jax.ShapeDtypeStruct((8, 33), jnp.int32, sharding=rows)
    step = functools.partial(train_step, config, nnx.graphdef(make_model(config, 257)), optimizer)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    used = jitted.lower(state, batch).compile().memory_analysis()
  assert report['argument_bytes_per_device'] == used.argument_size_in_bytes
  assert report['temporary_bytes_per_device'] == used.temp_size_in_bytes

  def held(tree) -> int:
    return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )

  assert report['weight_bytes_per_device'] == held(state.params)
  assert report['optimizer_bytes_per_device'] == held(state.opt_state)
  assert report['params_total'] == count_params(make_model(config, 257))[0]
  assert report['cache_bytes_per_token'] == 2 * (14 + 4)  # bytes, C + R
  assert report['cache_bytes'] == 5 * 100 * 2 * (14 + 4)
  users = (2**30 - 2 * report['params_total']) // (100 * report['cache_bytes_per_token'])
  assert report['users_per_device'] == users


def test_what_bounds_a_step_and_what_fits():
  config = tiny_config('gqa')
  report = dry_run.measure(config, machine(1), context=32)
  need = report['argument_bytes_per_device'] + report['temporary_bytes_per_device']
  assert report['fits'] and report['spare_bytes_per_device'] <= 2**30 - need
  assert report['kernels'] == ['blockwise'] or 'mla_causal_forward' in report['kernels']
  seconds = report['seconds_at_least']
  work = report['executed_flops_per_token'] * 8 * 32
  assert seconds['compute'] == pytest.approx(work / 1e12)
  assert seconds['links'] == report['collective_bytes_per_step'] == 0
  assert report['step_seconds_at_least'] == seconds[report['bound_by']] == max(seconds.values())
  slow = dry_run.measure(config, machine(1, CHIP._replace(memory=1, flops=1.0)), context=32)
  assert slow['bound_by'] == 'compute' and not slow['fits']
  assert slow['spare_bytes_per_device'] == report['spare_bytes_per_device'] - 2**30 + 1
  costs = dry_run.run_costs(report, machine(1), price=3.0, mfu=0.5)
  hours = report['flops_per_token'] * 8 * 32 * TINY['num_steps'] / (1e12 * 0.5) / 3600
  assert costs['hours'] == pytest.approx(hours) and costs['dollars'] == pytest.approx(3 * hours)
  tight = {**slow, 'fits': True, 'peak_bytes_per_device': 2**25}
  assert 'yes: 0.03 GiB of 0.00 MiB a device at once' in dry_run.card(tight, config)
  more = {'run': costs, 'largest_rows_at_once': 64, 'whole_weights': {'blocks.w_uk': 2**20}}
  for told in (report, slow, {**report, **more}):
    assert 'gqa' in dry_run.card(told, config)
  assert 'blocks.w_uk 1.00 MiB' in dry_run.card({**report, **more}, config)


@pytest.mark.parametrize('changes', [{}, {'remat': 'full', 'accumulation_steps': 2}])
def test_flops_are_six_a_weight_and_causal_attention(arm, changes):
  """Kaplan et al. 2020 (arXiv 2001.08361): 6 a weight and token; 6 a dim of q and v and token seen,
  of which there are (T + 1) / 2 on average."""
  config = tiny_config(arm, dtype='bfloat16', num_layers=3, **changes)
  weights = count_params(make_model(config, 257))[1] + config.d_model * 257
  query = round(make_attention(config, nnx.Rngs(0)).scale ** -2)  # scores come as / root of width
  seen = (config.seq_len + 1) / 2
  attention = 6 * config.num_layers * config.num_heads * (query + config.value_head_dim) * seen
  useful, executed = dry_run.flops_per_token(config, 257, jax.devices()[0])
  assert useful == pytest.approx(6 * weights + attention, rel=0.02)
  again = (executed - useful) / useful
  assert 0.2 < again < 0.4 if config.remat == 'full' else again < 0.1


def test_flops_beside_xlas_count():
  """Which has attention's whole square, and elementwise work."""
  sizes = {'d_model': 128, 'head_dim': 32, 'value_head_dim': 0, 'ffn_dim': 256, 'seq_len': 64}
  config = tiny_config('mha', **sizes)
  useful, _ = dry_run.flops_per_token(config, 61, jax.devices()[0])
  masked = 6 * config.num_layers * 4 * (32 + 32) * (64 - 1) / 2
  assert useful + masked < cost.train_flops_per_token(config, 61) < 1.12 * (useful + masked)


@pytest.mark.parametrize(
  ('temporary', 'peak', 'there', 'fits'),
  [(7, None, 10, True), (8, None, 10, False), (8, 10, 10, True), (8, 11, 10, False)],
)
def test_a_step_fits_by_its_peak_where_that_is_known(temporary, peak, there, fits):
  """Otherwise by all there is: arguments, results and temporaries."""
  step = dry_run.Step(None, 2, 1, temporary, hlo.Program(TPU), 0.0, peak)
  assert step.need == 3 + temporary and step.fits(there) == fits and step.fits(None)
  assert not step._replace(program=None).fits(there)


def test_the_largest_batch_is_searched_in_powers_of_two():
  config = tiny_config('mqa', num_layers=1)
  said: list[str] = []
  mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices()[:1])

  def need(rows: int) -> int:
    config.batch_size = rows
    step = dry_run.compile_step(config, 257, mesh)
    return step.argument_bytes + step.output_bytes + step.temporary_bytes

  enough, too_little = need(4), need(1) - 1
  for room, rows in ((enough, 4), (too_little, 0)):
    target = machine(1, CHIP._replace(memory=room))
    assert dry_run.largest_rows(config, target, said.append) == rows
  assert any('8 rows at once: do not fit' in line for line in said)


def test_a_sweeps_steps_are_compiled_once_each_and_its_trials_summed(monkeypatch):
  """Three distinct steps of eight trials; the cost is that of eight dry runs with a price."""
  config = tiny_config('mla', num_layers=1)
  arms = {
    'small': {'latent_dim': 8, 'num_steps': 100},
    'large': {'latent_dim': 24},
    'same': {'latent_dim': 8, 'weight_decay': 0.0},
    'shared': {'attention': 'mqa'},
  }
  todo = trials.expand(config, arms, [trials.parse_axis('seed=0,1')])
  measured = []
  measure = dry_run.measure
  monkeypatch.setattr(dry_run, 'measure', lambda *a, **k: measured.append(a) or measure(*a, **k))
  monkeypatch.setattr(targets, 'find', lambda name: machine(1))
  said: list[str] = []
  report = dry_sweep.answer(todo, price=3.0, mfu=0.5, say=said.append)
  assert len(measured) == len(said) == len(report['steps']) == 3 and report['trials'] == 8
  assert report['steps'][0]['arms'] == ['small', 'same'] and report['steps'][0]['trials'] == 4
  dollars = sum(
    dry_run.run_costs(
      {**step, 'num_steps': trial.config.num_steps}, machine(1), price=3.0, mfu=0.5
    )['dollars']
    for trial in todo
    for step in report['steps']
    if trial.arm in step['arms']
  )
  assert report['dollars'] == pytest.approx(dollars) and report['fits']
  json.dumps(report)
  card = dry_sweep.card(report).splitlines()
  assert card[-1].split()[:2] == ['all', '8'] and 'small same' in card[4]


def test_collectives_are_counted_with_their_loops_turns():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=PartitionSpec('x'), out_specs=PartitionSpec('x')
  )
  def body(x):
    def turn(x, _):
      total = jax.lax.psum(x, 'x')
      ring = [(i, (i + 1) % 8) for i in range(8)]
      return jax.lax.ppermute(jnp.sin(total * x), 'x', ring), None

    x, _ = jax.lax.scan(turn, x, None, length=5)
    whole = jax.lax.all_gather(x, 'x', tiled=True)
    return jax.lax.psum_scatter(jnp.cos(whole * x[0]), 'x', tiled=True)

  x = jax.ShapeDtypeStruct((8 * 16,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('x')))
  sent = hlo.Program(jax.jit(body).lower(x).compile().as_text()).collective_bytes()
  assert sent == {
    'all-gather': 8 * 64 * 7 / 8,
    'all-reduce': 5 * 2 * 64 * 7 / 8,
    'collective-permute': 5 * 64,
    'reduce-scatter': 8 * 64 * 7 / 8,
  }


# As libtpu's compiler writes it: no number of turns is noted, and a collective is spread over
# fusions.
TPU = """HloModule jit_step, num_partitions=8

%test (p: (u32[], bf16[2,8], u32[])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %n = u32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="while/cond/lt"}
}

%body (p: (u32[], bf16[2,8], u32[])) -> (u32[], bf16[2,8], u32[]) {
  %p.1 = (u32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %m = u32[]{:T(128)} get-tuple-element(%p.1), index=2
  %s = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %d = bf16[2,8]{1,0} collective-permute-done(%s)
  %f = bf16[4,8]{1,0} fusion(%d), kind=kCustom, calls=%again
  %again.j = u32[]{:T(128)} copy(%j)
  %next = u32[]{:T(128)} add(%again.j, %two)
  ROOT %t = (u32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:T(128)}) tuple(%next, %d, /*index=2*/%m)
}

%begin (a: bf16[2,8]) -> bf16[4,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  ROOT %g = bf16[4,8]{1,0} all-gather(%a), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%again (a: bf16[2,8]) -> bf16[4,8] {
  %a.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[4,8]{1,0} all-gather(%a.1), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%all-reduce-scatter.1 (a: f32[16]) -> f32[4] {
  %a.3 = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%a.3), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[4]{0} dynamic-slice(%r, %a.3), dynamic_slice_sizes={4}
}

ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %a.2 = bf16[2,8]{1,0} parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %eight = u32[]{:T(128)} constant(8)
  %c = u32[]{:T(128)} copy(%one)
  %b = bf16[4,8]{1,0} fusion(%a.2), kind=kCustom, calls=%begin
  %k = bf16[2,8]{1,0} custom-call(%a.2), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attend"}
  %rs = f32[4]{0} fusion(%k), kind=kCustom, calls=%all-reduce-scatter.1
  %ar = f32[16]{0} all-reduce(%k), channel_id=4, replica_groups={}, to_apply=%add
  %in = (u32[]{:T(128)}, bf16[2,8]{1,0}, u32[]{:T(128)}) tuple(%c, %k, %eight)
  %w = (u32[]{:T(128)}, bf16[2,8]{1,0}, u32[]{:T(128)}) while(%in), condition=%test, body=%body
  ROOT %o = bf16[2,8]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_a_tpus_program_is_read():
  program = hlo.Program(TPU)
  turns = 4  # 1, 3, 5, 7
  assert program.turns()[0]['body'] == turns
  assert program.collective_bytes() == {
    'all-gather': 32.0,
    'all-reduce': 2 * 64 * 7 / 8,
    'collective-permute': turns * 32.0,
    'reduce-scatter': 64 * 3 / 4,
  }
  assert program.custom_calls() == {'tpu_custom_call': 1}
  assert (32, 'bf16[2,8]', 'jit(step)/attend') in program.largest(9)


@pytest.mark.parametrize(
  ('message', 'temporary'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(3.12T) exceeds available HBM (15.75G).',
      int(3.12 * 2**40),
    ),
    ('RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded by 4.75G.', 2**34 + 2**32),
    ('RESOURCE_EXHAUSTED: something new', None),
  ],
)
def test_a_refusal_of_the_compiler_is_an_answer(monkeypatch, message, temporary):
  class Refusing:
    def trace(self, *_):
      return self

    def lower(self, *_):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(dry_run, 'jit_step', lambda *_: Refusing())
  config = tiny_config('mla')
  report = dry_run.measure(config, machine(1), context=32)
  assert not report['fits'] and report['bound_by'] == 'compute' and report['kernels'] == []
  if temporary and 'Used' in message:
    temporary += 2**29 - report['argument_bytes_per_device']
  assert report['temporary_bytes_per_device'] == temporary
  assert 'no: ' in dry_run.card(report, config)


def test_chips_are_alike_in_their_proportions():
  """A slip of the table would show in what all generations have in common."""
  for chip in targets.CHIPS.values():
    assert 100 < chip.flops / chip.bandwidth < 700  # FLOPs a byte
    assert 5e-3 < chip.memory / chip.bandwidth < 0.1  # seconds to read all of it
    assert 1 < chip.bandwidth / chip.links < 12


@pytest.mark.parametrize(
  ('asked', 'named'),
  [
    ({'target': 'v9:2x4'}, '--target=v9:2x4: no such target; .*v5e:2x4'),
    ({'price': 1.0}, '--price: the peak of cpu is not known'),
    ({'price': 0.0}, '--price=0.0: must be'),
    ({'mfu': 0.5}, '--mfu=0.5: goes with --price'),
    ({'price': 1.0, 'mfu': 1.5}, '--mfu=1.5: must be'),
    ({'context': 0}, '--context=0: must be'),
    ({'batch': 0}, '--batch=0: must be'),
  ],
)
def test_mistakes(asked, named):
  with pytest.raises(UserError, match=named):
    dry_run.answer(tiny_config('mla'), **asked)


@pytest.mark.parametrize('target', ['v5e:2x4', 'h100'])
def test_what_is_to_be_installed_is_said(monkeypatch, target):
  monkeypatch.setattr(targets, '_installed', lambda module: False)
  with pytest.raises(UserError, match=f"--target={target}: .*pip install 'jax"):
    targets.find(target)


def test_a_tokenizer_that_is_none():
  config = tiny_config('mla', data__tokenizer='words')
  with pytest.raises(UserError, match='data.tokenizer=words: choose bytes'):
    dry_run.measure(config, machine(1), context=32)
