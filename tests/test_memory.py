"""What a run needs at the least, against what JAX counts; and what there is, on made-up systems."""

import jax
import numpy as np
import pytest
from conftest import ARMS, tiny_config
from flax import nnx

from mla import memory, sharding
from mla import model as model_lib
from mla.errors import UserError
from mla.optimizer import make_optimizer
from mla.step import init_state


def one_device():
  return jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'), devices=jax.devices()[:1])


@pytest.mark.parametrize('arm', ARMS)
def test_the_need_counts_the_real_arrays(arm):
  """Parameters, moments and gradients: four times the parameters' bytes, from the drawn model."""
  config = tiny_config(arm)
  params = nnx.state(model_lib.make_model(config, 257), nnx.Param)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  needs = memory.training_needs(config, one_device())
  assert sum(need.nbytes for need in needs if need.what.startswith('parameters')) == 4 * total


def test_the_need_is_a_lower_bound_of_what_xla_counts():
  from mla import cost

  config = tiny_config('mla', num_layers=2, batch_size=8, seq_len=64)
  needs = sum(need.nbytes for need in memory.training_needs(config, one_device()))
  assert 0.3 < needs / cost.train_peak_bytes(config, 257, 'none') < 1


def test_a_mesh_divides_the_need():
  config = tiny_config('mha', batch_size=8)
  whole = sum(need.nbytes for need in memory.training_needs(config, one_device()))
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  assert sum(need.nbytes for need in memory.training_needs(config, mesh)) < whole / 2


@pytest.mark.parametrize('fsdp', [1, 2, 4, 8])
def test_fsdp_0_takes_as_many_devices_as_are_needed(monkeypatch, fsdp):
  config = tiny_config('mla', mesh__fsdp=0)
  monkeypatch.setattr(memory, '_is_cpu', lambda mesh: False)

  def needed(count: int) -> int:
    mesh = sharding.make_mesh({'data': -1, 'fsdp': count, 'tensor': 1})
    return sum(need.nbytes for need in memory.training_needs(config, mesh))

  assert needed(1) > needed(2) > needed(4) > needed(8)
  chosen = memory.training_mesh(config, there=2 * needed(fsdp))
  assert dict(chosen.shape) == {'data': 8 // fsdp, 'fsdp': fsdp, 'tensor': 1}
  assert memory.training_mesh(config, there=1).shape['fsdp'] == 8  # where no number is enough
  config.mesh = {'data': -1, 'fsdp': 0, 'tensor': 2}
  assert memory.training_mesh(config, there=1).shape['fsdp'] == 4
  for data, asked in ((-1, 1), (2, 4), (8, 0)):  # one that is said is left as it is
    config.mesh = {'data': data, 'fsdp': asked, 'tensor': 1}
    assert memory.training_mesh(config, there=1).shape['fsdp'] == (asked or 1)


def test_devices_that_share_their_memory_gain_nothing_by_fsdp():
  assert memory.training_mesh(tiny_config('mla'), there=1).shape['fsdp'] == 1


def test_nothing_is_allocated_and_a_hundred_thousand_layers_take_no_time():
  config = tiny_config('mla', num_layers=100_000, ffn_dim=10**7)
  with pytest.raises(UserError, match='GiB of memory .* lower (ffn_dim|num_layers)'):
    memory.check_training(config, one_device())


def test_what_fits_is_not_refused(monkeypatch):
  config = tiny_config('mla')
  needed = sum(need.nbytes for need in memory.training_needs(config, one_device()))
  monkeypatch.setattr(memory, 'available', lambda: needed)
  memory.check_training(config, one_device())
  monkeypatch.setattr(memory, 'available', lambda: needed - 1)
  with pytest.raises(UserError, match='training needs at least'):
    memory.check_training(config, one_device())


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'seq_len': 10**9}, 'seq_len=1000000000'),
    ({'batch_size': 10**9}, 'batch_size=1000000000'),
    ({'ffn_dim': 10**10}, 'ffn_dim=10000000000'),
    ({'latent_dim': 10**10}, 'latent_dim=10000000000'),
  ],
)
def test_the_field_to_lower_is_the_one_that_is_too_large(changes, named):
  with pytest.raises(UserError, match=named):
    memory.check_training(tiny_config('mla', **changes), one_device())


def system(tmp_path, meminfo: str, limit: str = 'max', held: int = 0):
  proc, cgroups = tmp_path / 'proc', tmp_path / 'cgroup'
  (proc / 'self').mkdir(parents=True)
  (cgroups / 'job').mkdir(parents=True)
  (proc / 'meminfo').write_text(meminfo)
  (proc / 'self' / 'cgroup').write_text('0::/job\n')
  (cgroups / 'job' / 'memory.max').write_text(limit + '\n')
  (cgroups / 'job' / 'memory.stat').write_text(f'anon {held}\nfile 77\n')
  return memory.available(proc, cgroups)


PLENTY = 'MemTotal: 9000000 kB\nMemAvailable: 4000000 kB\nSwapFree: 0 kB\n'


def test_a_containers_limit_counts_where_it_is_lower(tmp_path):
  assert system(tmp_path / 'a', PLENTY) == 4_000_000 * 1024
  assert system(tmp_path / 'b', PLENTY, limit='1000000', held=400_000) == 600_000
  assert system(tmp_path / 'c', PLENTY, limit=str(10**15)) == 4_000_000 * 1024


def test_swap_counts_and_a_system_that_says_nothing_limits_nothing_wrongly(tmp_path):
  assert system(tmp_path / 'a', PLENTY.replace('SwapFree: 0', 'SwapFree: 1000')) == 4_001_000 * 1024
  assert system(tmp_path / 'b', '') > 2**30


def test_abstract_parameters_are_those_that_are_drawn():
  """No parameter is without its axes, which the message counts on."""
  config = tiny_config('mla_query_latent')
  state = jax.eval_shape(lambda: init_state(config, 257, make_optimizer(config)))
  sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
  assert sizes == {n.shape for n in memory.training_needs(config, one_device()) if 'par' in n.what}
  assert np.all([n.nbytes > 0 for n in memory.training_needs(config, one_device())])
