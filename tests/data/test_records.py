"""Files of many documents, and what is wrong with them in one line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import texts_of, tiny_config

from mla.data import user_files
from mla.errors import UserError

TEXTS = [
  'one',
  'two\r\nlines\r\n',
  'a \0 byte',
  '\ufeffmarked',
  'é\U0001f99c',
  'x' * 300_000,
  ' \n',
  '',
]
KEPT = [text for text in TEXTS if text.strip()]


def lines(texts=TEXTS, key: str = 'text') -> bytes:
  return b''.join(json.dumps({'id': n, key: text}).encode() + b'\n' for n, text in enumerate(texts))


def write(path, texts=TEXTS, key: str = 'text') -> None:
  name = path.name.lower()
  if name.endswith('.parquet'):
    table = pyarrow.table({'id': list(range(len(texts))), key: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
  elif name.endswith('.gz'):
    path.write_bytes(gzip.compress(lines(texts, key)))
  elif name.endswith('.zst'):  # in two frames, as parallel writers leave them
    whole = lines(texts, key)
    path.write_bytes(b''.join(map(zstandard.compress, (whole[:99], whole[99:]))))
  else:
    path.write_bytes(lines(texts, key))


KINDS = ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet']
UPPER = ['A.JSONL.GZ', 'A.JSONL.ZST', 'A.PARQUET']


def data_of(pattern, **fields):
  data = tiny_config().data
  data.update({'files': str(pattern), **fields})
  return data


def apart(folder, **fields):
  (folder / 'v.txt').write_text('held out')
  return {'validation_files': str(folder / 'v.txt'), **fields}


@pytest.mark.parametrize('name', KINDS + UPPER)
def test_documents_are_as_they_stand_and_blank_ones_are_left_out(tmp_path, name):
  write(tmp_path / name)
  assert texts_of(data_of(tmp_path / name, **apart(tmp_path)), 'train') == KEPT


@pytest.mark.parametrize('name', KINDS)
def test_any_key(tmp_path, name):
  write(tmp_path / name, key='body')
  assert texts_of(data_of(tmp_path / name, **apart(tmp_path, text_key='body')), 'train') == KEPT
  with pytest.raises(UserError, match=r'data.text_key=text: no such text in .*; it has id, body'):
    texts_of(data_of(tmp_path / name, **apart(tmp_path)), 'train')


def test_shards_of_all_kinds_in_the_order_of_their_names(tmp_path):
  names = ['0.parquet', '1.jsonl.gz', '10.txt', '2.jsonl.zst', '3.jsonl']
  for name in names:
    if name.endswith('.txt'):
      (tmp_path / name).write_text(f'from {name}')
    else:
      write(tmp_path / name, [f'from {name}'])
  data = data_of(tmp_path / '[0-9]*', **apart(tmp_path))
  assert texts_of(data, 'train') == [f'from {name}' for name in names]


@pytest.mark.parametrize('name', KINDS)
def test_every_tenth_record_is_held_out(tmp_path, name):
  texts = [f'record {n}' for n in range(35)]
  write(tmp_path / name, texts)
  parts = [texts_of(data_of(tmp_path / name), split) for split in ('train', 'validation')]
  assert parts[1] == ['record 9', 'record 19', 'record 29']
  assert sorted(parts[0] + parts[1]) == sorted(texts)


def test_marks_and_line_ends_around_records_are_no_text(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(
    b'\xef\xbb\xbf' + lines(['one', 'two']).replace(b'\n', b'\r\n') + b'\r\n\n'
  )
  assert texts_of(data_of(tmp_path / 'a.jsonl', **apart(tmp_path)), 'train') == ['one', 'two']


@pytest.mark.parametrize(
  ('content', 'named'),
  [
    (b'{"text": "a"}\n{"text": "\xff"}\n', 'is not UTF-8 in line 2'),
    (b'{"text": "a"}\n{"text": \n', 'is no JSON in line 2'),
    (b'[' * 100_000, 'is no JSON in line 1'),
    (b'[1]\n', 'no such text in line 1'),
    (b'{"text": null}\n', 'no such text in line 1 .*None'),
    (b'{"text": 3}\n', 'no such text in line 1'),
    (b'{"text": "\\ud800"}\n', 'text that is not UTF-8 in record 1'),
    (b'', 'holds no text'),
    (b'{"text": " "}\n', 'holds no text'),
  ],
)
def test_what_is_wrong_with_lines(tmp_path, content, named):
  (tmp_path / 'a.jsonl').write_bytes(content)
  with pytest.raises(UserError, match=named) as caught:
    texts_of(data_of(tmp_path / 'a.jsonl', **apart(tmp_path)), 'train')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', [pyarrow.string(), pyarrow.binary()], ids=str)
def test_a_column_of_texts_or_bytes_that_are_not_utf_8(tmp_path, kind):
  texts = [b'fine \xc3\xa9', b'spoilt \xc3(']
  ends = pyarrow.array([0, len(texts[0]), len(b''.join(texts))], pyarrow.int32())
  buffers = [None, ends.buffers()[1], pyarrow.py_buffer(b''.join(texts))]
  table = pyarrow.table({'text': pyarrow.Array.from_buffers(kind, 2, buffers)})
  pyarrow.parquet.write_table(table.slice(0, 1), tmp_path / 'a.parquet')
  data = data_of(tmp_path / 'a.parquet', **apart(tmp_path))
  assert texts_of(data, 'train') == [texts[0].decode()]
  pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
  with pytest.raises(UserError, match='a.parquet has text that is not UTF-8 in record 2'):
    texts_of(data, 'train')


@pytest.mark.parametrize('column', [[3, 4], [None, 'a'], [['a'], []]], ids=str)
def test_a_column_of_something_else(tmp_path, column):
  pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'a.parquet')
  with pytest.raises(UserError, match='no such text in record 1 .*it has .* there'):
    texts_of(data_of(tmp_path / 'a.parquet', **apart(tmp_path)), 'train')


@pytest.mark.parametrize('name', KINDS[1:])
@pytest.mark.parametrize('damage', ['torn', 'noise', 'empty'])
def test_damaged_files_are_named(tmp_path, name, damage):
  path = tmp_path / name
  write(path, [f'{n} and so on' * 50 for n in range(2000)])
  whole = path.read_bytes()
  path.write_bytes({'torn': whole[: len(whole) // 2], 'noise': b'noise' * 99, 'empty': b''}[damage])
  if damage == 'empty' and not name.endswith('.parquet'):
    named = 'holds no text'
  else:
    named = rf'{name} is (damaged after record|no JSON in line)'
  with pytest.raises(UserError, match=named):
    texts_of(data_of(path, **apart(tmp_path)), 'train')


def test_a_large_text_is_read_as_a_small_one(tmp_path, monkeypatch):
  content = '\ufeff' + 'words and é, line after line\r\n' * 500
  (tmp_path / 'a.txt').write_text(content, newline='')
  data = data_of(tmp_path / 'a.txt')
  small = [texts_of(data, split) for split in ('train', 'validation')]
  monkeypatch.setattr(user_files, 'BLOCK', 101)
  assert [texts_of(data, split) for split in ('train', 'validation')] == small
  assert ''.join(small[0] + small[1]) == content[1:]
  (tmp_path / 'a.txt').write_bytes(content.encode() + b'\xc3(')
  with pytest.raises(UserError, match=f'is not UTF-8 at byte {len(content.encode()) - 3}'):
    texts_of(data, 'train')
