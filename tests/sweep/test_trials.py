"""Axes and named arms become checked trials; what is wrong names the trial."""

import time
import unicodedata

import pytest
from conftest import tiny_config

from mla.errors import UserError
from mla.sweep import run as sweep
from mla.sweep.trials import check, digest, expand, load_arms, parse_axis


def trials_of(*axes: str, arms=None):
  return expand(tiny_config('mla'), arms or {}, [parse_axis(axis) for axis in axes])


def test_axes_multiply_and_zipped_fields_move_together():
  trials = trials_of('attention,num_kv_heads=mha:0,gqa:2,mqa:0', 'seed=0,1')
  found = [(t.config.attention, t.config.num_kv_heads, t.config.seed) for t in trials]
  assert found == [(a, k, s) for a, k in (('mha', 0), ('gqa', 2), ('mqa', 0)) for s in (0, 1)]


def test_an_arm_is_all_but_seed_and_learning_rate():
  trials = trials_of('latent_dim=8,16', 'learning_rate=1e-3,3e-3', 'seed=0,1')
  assert len({t.name for t in trials}) == 8
  assert [t.arm for t in trials] == ['latent_dim=8'] * 4 + ['latent_dim=16'] * 4
  assert len({t.digest for t in trials}) == 8


def test_named_arms_keep_their_name_and_take_axes():
  trials = trials_of('latent_dim=8,16', arms={'small': {'rope_dim': 4}, 'large': {'rope_dim': 8}})
  assert [t.arm for t in trials] == [
    f'{name},latent_dim={c}' for name in ('small', 'large') for c in (8, 16)
  ]
  assert [t.config.rope_dim for t in trials] == [4, 4, 8, 8]
  assert trials_of('seed=1', arms={'small': {'rope_dim': 4}})[0].name == 'small,seed=1'


def test_values_take_the_type_of_their_field():
  (trial,) = trials_of('latent_dim,learning_rate,data.dataset=16:1e-3:my/text')
  assert trial.config.latent_dim == 16 and isinstance(trial.config.latent_dim, int)
  assert trial.config.learning_rate == 1e-3
  assert trial.config.data.dataset == 'my/text'
  assert '/' not in trial.name


def test_a_single_fields_value_may_hold_a_colon():
  tokenizers = [t.config.data.tokenizer for t in trials_of('data.tokenizer=bytes,bpe:300')]
  assert tokenizers == ['bytes', 'bpe:300']


def test_a_tokenizer_json_is_known_by_its_content(tmp_path):
  for name, content in (('a', '{}'), ('b', '{"x": 1}'), ('copy_of_a', '{}')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'tokenizer.json').write_text(content)
  a, b = trials_of(f'data.tokenizer=hf:{tmp_path}/a/tokenizer.json,hf:{tmp_path}/b/tokenizer.json')
  (copy,) = trials_of(f'data.tokenizer=hf:{tmp_path}/copy_of_a')
  assert a.digest == copy.digest and a.arm_digest == copy.arm_digest
  assert a.digest != b.digest and a.arm_digest != b.arm_digest
  # A run is known by the copy that it keeps, whatever has come to lie where it was taken from.
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'tokenizer.json').write_text('{}')
  (tmp_path / 'a' / 'tokenizer.json').write_text('{"y": 1}')
  assert digest(a.config, run) == copy.digest != a.digest


def test_the_sweeps_own_config_is_left_alone():
  config = tiny_config('mla')
  before = config.to_dict()
  expand(config, {'a': {'latent_dim': 8}}, [parse_axis('data.eval_tokens=7')])
  assert config.to_dict() == before


@pytest.mark.parametrize(
  'axes, named',
  [
    (['latent_dims=8'], 'latent_dims=8: latent_dims: no such field'),
    (['latent_dim=8,wide'], 'trial latent_dim=wide: latent_dim=wide: must be an integer'),
    (['latent_dim=8.5'], 'must be an integer'),
    (['learning_rate=fast'], 'must be a number'),
    (['data=x'], 'is a group'),
    (['latent_dim=8,0'], 'trial latent_dim=0: latent_dim=0: mla needs'),
    (['attention,num_kv_heads=mha:0,gqa:3'], 'trial attention=gqa,num_kv_heads=3: num_kv_heads=3'),
    (['attention,num_kv_heads=mha,gqa:2'], 'gives 1 values for 2 fields'),
    (['latent_dim=8', 'latent_dim=16'], 'set twice'),
    (['latent_dim=8,8'], 'occurs 2 times'),
    (['latent_dim'], 'write FIELD=VALUE'),
    (['latent_dim='], 'write FIELD=VALUE'),
    (['seed,seed=1:2'], 'twice'),
  ],
)
def test_bad_axes(axes, named):
  with pytest.raises(UserError) as caught:
    trials_of(*axes)
  assert named in str(caught.value)


def test_arms_files(tmp_path):
  good, bad = tmp_path / 'good.py', tmp_path / 'bad.py'
  good.write_text("def get_arms():\n  return {'a': {'latent_dim': 4}}\n")
  bad.write_text('x = 1\n')
  assert load_arms(str(good)) == {'a': {'latent_dim': 4}}
  for path in (bad, tmp_path / 'none.py'):
    with pytest.raises(UserError, match=path.name):
      load_arms(str(path))


@pytest.mark.parametrize(
  'source',
  [
    "{1: {'latent_dim': 4}, '1': {'latent_dim': 8}}",  # one of the two would be lost
    "__import__('sys').exit(3)",
  ],
)
def test_an_arms_file_that_cannot_be_meant(source, tmp_path):
  path = tmp_path / 'arms.py'
  path.write_text(f'def get_arms():\n  return {source}\n')
  with pytest.raises(UserError, match='arms.py'):
    load_arms(str(path))


NAMES = {
  'case': ['a', 'A', 'ä', 'Ä'],
  'the encoding of an accent': [unicodedata.normalize(form, 'größer,é') for form in ('NFC', 'NFD')],
  'alphabets': ['δ' * 120, '模' * 90, '模' * 91, 'ك' * 150, '🙂' * 70],
  'length': ['x' * 200, 'x' * 201],
  'no file': ['.', '..', '/', 'a/b', 'a_b', '.a', '-', '-rf', '~', '*', '[x]', 'nul', '%s'],
  'fields': ['seed=1', 'a,seed=1', 'learning_rate=0.001'],
}


@pytest.mark.parametrize('kind', NAMES)
def test_every_name_becomes_a_folder_of_its_own(kind, text, tmp_path):
  arms = {name: {'latent_dim': 4 + 2 * n} for n, name in enumerate(NAMES[kind])}
  config = tiny_config('mla', data__files=str(text))
  trials = expand(config, arms, [parse_axis('seed=0,1')])
  for trial in trials:
    assert len(f'{trial.name}.json'.encode()) <= 255
    (tmp_path / 'trials' / trial.name).mkdir(parents=True)
  assert sorted(path.name for path in (tmp_path / 'trials').iterdir()) == sorted(
    trial.name for trial in trials
  )
  # Apart also on a disk that does not tell case, or composes accents.
  folded = {unicodedata.normalize('NFD', trial.name).casefold() for trial in trials}
  assert len(folded) == len(trials)
  check(trials, tmp_path, on_these_devices=False)


@pytest.mark.parametrize('name', ['a\nb', 'a\x1b[2J', 'a\u2028b', '\ud800'])
def test_a_name_that_breaks_a_line_is_refused(name):
  with pytest.raises(UserError, match='one line of text') as caught:
    trials_of('seed=0', arms={name: {'latent_dim': 4}})
  assert str(caught.value).isprintable()


def test_arms_of_one_name_are_refused():
  arms = {'': {'latent_dim': 4}, 'mla': {'latent_dim': 8}}  # one without is called by attention
  with pytest.raises(UserError, match='called mla, as is one with other settings'):
    trials_of('seed=0', arms=arms)


def test_hundreds_of_trials_are_there_at_once(tmp_path):
  numbers = ','.join(map(str, range(150)))
  began = time.monotonic()
  trials = trials_of('latent_dim=4,8,12', 'learning_rate=1e-3,2e-3', f'seed={numbers}')
  assert len(sweep.missing(trials, tmp_path)) == 900
  assert time.monotonic() - began < 20  # 2 s


def test_fields_that_are_no_text_or_number_are_refused():
  config = tiny_config('mla')
  config.dtype = None
  with pytest.raises(UserError, match='dtype: is NoneType, which no sweep can set'):
    expand(config, {}, [parse_axis('dtype=float32')])
