"""--init_from: another run's weights, and nothing else of it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SHORT_RUN, tiny_config
from flax import nnx

from mla import hosts, init_from
from mla import model as model_lib
from mla.checkpoint import Checkpoints, flatten
from mla.errors import UserError
from mla.train import train_and_evaluate
from mla.workdir import check_workdir, read_config


def config_of(text: Path, **changes):
  fields = {**SHORT_RUN, 'num_steps': 2, 'warmup_steps': 0, 'batch_size': 8, **changes}
  config = tiny_config(data__files=str(text))
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def source(tmp_path_factory, text) -> Path:
  workdir = tmp_path_factory.mktemp('source') / 'run'
  train_and_evaluate(config_of(text), workdir)
  return workdir


def params_of(config) -> nnx.State:
  everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, params = nnx.split(nnx.eval_shape(lambda: model_lib.make_model(config, 257)))
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), params
  )


def saved(workdir: Path) -> dict[str, np.ndarray]:
  config = read_config(workdir)
  used = {'config': config.to_dict(), 'data': None}
  _, params = Checkpoints(workdir).read_params(params_of(config), used)
  return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def test_a_run_starts_with_the_weights_on_its_own_text_and_schedule(source, tmp_path):
  other = tmp_path / 'other.txt'
  other.write_text('a quite different text, of no bottles at all\n' * 400)
  still = config_of(other, num_steps=1, learning_rate=1e-12, weight_decay=0.0)
  train_and_evaluate(still, tmp_path / 'run', init_from=source)
  began, now = saved(source), saved(tmp_path / 'run')
  assert began.keys() == now.keys()
  for name in began:
    np.testing.assert_allclose(now[name], began[name], atol=1e-9)
  assert json.loads((tmp_path / 'run' / init_from.RECORD).read_text())['workdir'] == str(source)
  train_and_evaluate(still, tmp_path / 'run', init_from=source)  # the same command again
  with pytest.raises(UserError, match='holds a run that began with those of'):
    train_and_evaluate(still, tmp_path / 'run', init_from=tmp_path)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_with_the_same(source, tmp_path):
  assert init_from.settle(tmp_path, None, begun=False) is None
  assert init_from.settle(tmp_path, source, begun=False) == str(source)
  assert init_from.settle(tmp_path, None, begun=False) == str(source)


def test_before_its_first_checkpoint_another_run_may_be_asked_for(source, tmp_path):
  """What was asked for first may not have fitted."""
  workdir = tmp_path / 'new'
  workdir.mkdir()
  init_from.settle(workdir, tmp_path / 'unfit', begun=False)
  assert init_from.settle(workdir, source, begun=False) == str(source)
  assert init_from.settle(workdir, None, begun=True) == str(source)
  with pytest.raises(UserError, match='holds a run that began with those of'):
    init_from.settle(workdir, tmp_path / 'unfit', begun=True)


def test_a_run_that_began_afresh_is_not_overwritten(source):
  with pytest.raises(UserError, match='began with fresh weights; leave the flag out'):
    init_from.settle(source, source, begun=True)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    (
      {'latent_dim': 8},
      r'gain is \[1, 14\] there and \[1, 8\] here; set --config.latent_dim=14, or',
    ),
    ({'attention': 'mha'}, 'is .* there and missing here; set --config.attention=mla'),
    ({'num_layers': 2}, 'num_layers=1'),
  ],
)
def test_weights_that_do_not_fit(source, text, changes, named):
  config = config_of(text, **changes)
  with pytest.raises(UserError, match=f'--init_from=.*{named}'):
    init_from.weights(source, config, 'bytes', params_of(config))


def test_weights_that_do_not_fit_of_a_config_that_lacks_fields_of_other_variants(
  source, text, tmp_path
):
  shutil.copytree(source, tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  fields = json.loads(path.read_text())
  del fields['num_kv_heads']  # mla reads none, and a run of another program may have none
  path.write_text(json.dumps(fields))
  config = config_of(text, latent_dim=8)
  with pytest.raises(UserError, match='set --config.latent_dim=14, or'):
    init_from.weights(tmp_path / 'run', config, 'bytes', params_of(config))


def test_the_first_process_says_whose_checkpoint_is_the_newest(source, text, tmp_path, monkeypatch):
  shutil.copytree(source, tmp_path / 'run')
  shutil.copytree(source / 'checkpoints' / '2', tmp_path / 'run' / 'checkpoints' / '9')

  def as_the_second_of_two(decide):
    return 2 if decide.__name__ == '_newest' else decide()

  monkeypatch.setattr(hosts, 'first_decides', as_the_second_of_two)
  config = config_of(text)
  assert init_from.weights(tmp_path / 'run', config, 'bytes', params_of(config))[0] == 2


def test_tokens_of_another_tokenizer_are_refused(source, text):
  config = config_of(text)
  with pytest.raises(UserError, match='another tokenizer'):
    init_from.weights(source, config, 'another digest', params_of(config))


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'num_steps': 9}, 'num_steps=9: .* run of 2, .*--init_from=.*run --workdir=.*run-9$'),
    ({'attention': 'mqa'}, '--workdir=.*run-mqa; to go on'),
    ({'latent_dim': 8}, 'with latent_dim=14; .*--workdir=.*run-latent_dim8; to go on'),
    ({'data.files': '/a/long/path/of.txt'}, '--workdir=.*run-files; to go on'),
  ],
)
def test_a_run_that_differs_is_told_its_folder(source, text, changes, named):
  with pytest.raises(UserError, match=named):
    check_workdir(config_of(text, **changes), source)


def test_what_no_shape_shows_is_told(source, caplog):
  """Plain weights in a nested model are another function."""
  config = config_of(Path('any'), nested='4,8,14')
  tokenizer = Checkpoints(source).newest()[0]['tokenizer']
  init_from.weights(source, config, tokenizer, params_of(config))
  assert 'nested= there, 4,8,14 here' in caplog.text


def test_a_source_that_is_not_there_is_told_by_its_flag(tmp_path, text):
  with pytest.raises(UserError, match='--init_from=.*gone: no run there'):
    init_from.weights(tmp_path / 'gone', config_of(text), 'digest', None)
