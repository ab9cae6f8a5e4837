"""What can't be represented, is cut off or is of another kind: one line, and nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import break_as, tiny_config
from planted import plant
from safetensors.numpy import load_file, save_file

from configs import base
from mla.convert import exporting, importing
from mla.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope='module')
def exported(text, tmp_path_factory):
  """A folder of Llama's layout, one of DeepSeek-V3's."""
  root = tmp_path_factory.mktemp('exported')
  for arm in ('gqa', 'mla'):
    config = tiny_config(arm, value_head_dim=0)
    exporting.export(plant(config, root / f'{arm}_run', text), root / arm, 'auto')
  return root


def copy_of(folder: Path, to: Path) -> Path:
  to.mkdir()
  for path in folder.iterdir():
    (to / path.name).write_bytes(path.read_bytes())
  return to


def refused(folder: Path, tmp_path: Path, match: str) -> None:
  before = sorted(path.name for path in tmp_path.iterdir())
  with pytest.raises(UserError, match=match) as told:
    importing.import_folder(folder, base.get_config(), tmp_path / 'run')
  assert '\n' not in str(told.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == before  # no draft either


KEYS = [
  ('gqa', 'model_type', 'mamba', 'model_type=mamba'),
  ('gqa', 'model_type', None, 'model_type=None'),
  ('gqa', 'attention_bias', True, 'attention_bias=True'),
  ('gqa', 'mlp_bias', True, 'mlp_bias=True'),
  ('gqa', 'hidden_act', 'gelu', 'hidden_act=gelu'),
  ('gqa', 'sliding_window', 128, 'sliding_window=128'),
  ('gqa', 'layer_types', ['full_attention', 'sliding_attention'], 'layer_types'),
  ('gqa', 'quantization_config', {'bits': 4}, 'quantization_config'),
  ('gqa', 'num_local_experts', 8, 'num_local_experts=8'),
  ('gqa', 'rope_parameters', {'rope_type': 'longrope', 'rope_theta': 1e4}, 'rope_type=longrope'),
  ('gqa', 'rope_parameters', {'rope_type': 'yarn', 'factor': 2, 'mscale_all_dim': 1}, 'mscale_all'),
  ('gqa', 'rope_parameters', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
  ('gqa', 'rope_parameters', {'rope_type': 'llama3', 'factor': 2}, 'low_freq_factor is missing'),
  ('gqa', 'hidden_size', 'wide', 'hidden_size=wide'),
  ('gqa', 'hidden_size', None, 'hidden_size is missing'),
  ('gqa', 'hidden_size', 64, r'embed_tokens.weight is \[257, 32\]'),
  ('gqa', 'num_key_value_heads', 3, 'num_kv_heads=3'),
  ('gqa', 'rms_norm_eps', -1.0, 'norm_eps=-1'),
  ('mla', 'first_k_dense_replace', 1, 'first_k_dense_replace=1'),
  ('mla', 'num_hidden_layers', 1, 'has model.layers.1'),
  ('mla', 'num_key_value_heads', 2, 'num_key_value_heads=2'),
]


@pytest.mark.parametrize('arm, key, value, match', KEYS)
def test_a_config_we_cannot_represent(arm, key, value, match, exported, tmp_path):
  folder = copy_of(exported / arm, tmp_path / 'their')
  found = json.loads((folder / 'config.json').read_text())
  found[key] = value
  if key == 'num_hidden_layers':
    found['first_k_dense_replace'] = value
  (folder / 'config.json').write_text(json.dumps(found))
  refused(folder, tmp_path, match)


DAMAGES = ['gone', 'folder', 'pipe', 'torn', b'', b'GGUF not safetensors', b'\xff' * 4000, 'link']


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'tokenizer.json'])
def test_a_damaged_file(name, damage, exported, tmp_path):
  folder = copy_of(exported / 'mla', tmp_path / 'their')
  break_as(folder / name, damage)
  refused(folder, tmp_path, str(folder))


def test_tensors_that_do_not_fit(exported, tmp_path):
  folder = copy_of(exported / 'mla', tmp_path / 'their')
  path = folder / 'model.safetensors'
  whole = load_file(path)
  name = 'model.layers.0.self_attn.kv_b_proj.weight'
  for change, match in [
    ({name: whole[name].T.copy()}, f'{name} is'),
    ({name: whole[name].astype(np.int32)}, f'{name} is kept as I32'),
    ({'model.layers.0.self_attn.q_proj.bias': np.zeros(3, np.float32)}, 'has .*q_proj.bias'),
  ]:
    save_file({**whole, **change}, path)
    refused(folder, tmp_path, match)
  save_file({key: value for key, value in whole.items() if key != name}, path)
  refused(folder, tmp_path, f'lacks {name}')


def test_a_latent_that_can_be_cut_has_no_format(text, tmp_path):
  workdir = plant(tiny_config('mla_nested'), tmp_path / 'run', text)
  with pytest.raises(
    UserError, match='^nested=4,8,14: each block .* only the first, --latent_dim=4,'
  ):
    exporting.export(workdir, tmp_path / 'out', 'auto')
  with pytest.raises(UserError, match='^nested=4,8: each block'):
    exporting.export(workdir, tmp_path / 'out', 'auto', latent_dim=8)
  assert not (tmp_path / 'out').exists()


def test_nothing_is_unpickled(exported, tmp_path):
  folder = copy_of(exported / 'mla', tmp_path / 'their')
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
  refused(folder, tmp_path, 'pytorch_model.bin: is a pickle')


@pytest.mark.parametrize(
  'table, match',
  [
    ({'a': '../model.safetensors'}, 'no safetensors file beside it'),
    ({'a': 'model-1.safetensors'}, 'is missing'),
    ({'a': 3}, 'weight_map'),
    ([], 'weight_map'),
  ],
)
def test_a_foreign_index(table, match, exported, tmp_path):
  folder = copy_of(exported / 'mla', tmp_path / 'their')
  (folder / 'model.safetensors').rename(folder / 'other.safetensors')
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': table}))
  refused(folder, tmp_path, match)


@pytest.mark.parametrize('damage', [b'', b'GGUF', b'GGUF' + b'\xff' * 400, b'PK' * 100, 'folder'])
def test_a_foreign_gguf(damage, tmp_path):
  path = tmp_path / 'model.gguf'
  path.write_bytes(b'')
  break_as(path, damage)
  with pytest.raises(UserError, match=str(path)):
    importing.import_gguf(path, base.get_config(), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_folder_that_is_taken(exported, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'mine').write_text('dear')
  refused(exported / 'mla', tmp_path, 'run: is not empty')
  with pytest.raises(UserError, match='--out=.*run: is not empty'):
    exporting.export(exported / 'mla_run', tmp_path / 'run', 'auto')
  assert (tmp_path / 'run' / 'mine').read_text() == 'dear'


@pytest.mark.parametrize(
  'arm, kind, fields, match',
  [
    ('mha_partial_rope', 'auto', {'value_head_dim': 0}, 'rope_dim=2'),
    ('mha', 'auto', {}, 'value_head_dim=10'),
    ('mha', 'deepseek_v3', {'value_head_dim': 0}, '--format=deepseek_v3: mha is written as llama'),
    ('mla', 'llama', {}, '--format=llama: mla'),
    ('mla', 'deepseek_v2', {'d_model': 30}, 'num_heads=4'),
    ('mla', 'auto', {'rope_scaling': 'yarn:factor=2,original=9,mscale=0.5'}, 'rope_scaling='),
  ],
)
def test_a_run_that_has_no_words_there(arm, kind, fields, match, text, tmp_path):
  config = tiny_config(arm, **fields)
  plant(config, tmp_path / 'run', text)
  with pytest.raises(UserError, match=match):
    exporting.export(tmp_path / 'run', tmp_path / 'out', kind)
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_an_imported_run_is_not_trained_on(exported, tmp_path):
  from mla.train import train_and_evaluate

  config = importing.import_folder(exported / 'mla', base.get_config(), tmp_path / 'run')
  with pytest.raises(UserError, match='--init_from'):
    train_and_evaluate(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'checkpoints' / '0' / 'params').is_dir()


@pytest.mark.parametrize(
  'words, match',
  [
    ([], 'choose one of import'),
    (['import'], '--workdir'),
    (['import', '--workdir=W'], '--hf'),
    (['import', '--workdir=W', '--hf=nowhere'], 'nowhere'),
    (['export', '--workdir=nowhere', '--out=o'], 'no run there'),
    (['export', '--workdir=nowhere'], '--out'),
    (['melt'], 'melt: choose one of'),
  ],
)
def test_a_wrong_command_line(words, match, tmp_path):
  done = subprocess.run(
    [sys.executable, ROOT / 'convert.py', *words], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 2 and match in done.stderr and done.stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())
