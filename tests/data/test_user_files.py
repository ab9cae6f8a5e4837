"""A user's files: what counts as text, which files a pattern means, and what is held out."""

import contextlib
import glob
import os
import random
import socket
import tempfile
from pathlib import Path

import pytest
from conftest import plain_user, texts_of, tiny_config

from mla.data import user_files
from mla.errors import MachineError, UserError

WORDS = 'the of senate é 国 🦜 and expediency \u2028 \x1c a'.split(' ')
ENDS = {'lines': '\n', 'windows': '\r\n', 'one line': ' ', 'no white space': '', 'old': '\r'}


def data_of(files, **fields):
  data = tiny_config().data
  data.update({'files': str(files), **fields})
  return data


def load(files, **fields):
  return [texts_of(data_of(files, **fields), split) for split in ('train', 'validation')]


def split_text(text: str) -> tuple[str, str]:
  raw = text.encode()
  end = user_files.cut(raw, len(text))
  return raw[:end].decode(), raw[end:].decode()


def refused(named, files, split='train', **fields):
  with pytest.raises(UserError, match=named) as caught:
    texts_of(data_of(files, **fields), split)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('block', [2**22, 7])  # bytes that are looked at together
@pytest.mark.parametrize('kind', ENDS)
def test_the_held_out_share_is_bounded_and_nothing_is_lost(monkeypatch, kind, block):
  monkeypatch.setattr(user_files, 'BLOCK', block)
  draw = random.Random(kind)
  for _ in range(100):
    size, longest = draw.randrange(1, 400), draw.choice([1, 5, 30, 400])
    parts = [''.join(draw.choices(WORDS, k=draw.randrange(1, longest + 1))) for _ in range(size)]
    text = ENDS[kind].join(parts)[: draw.randrange(20, 4000)]
    if len(text) < 20:
      continue
    train, held_out = split_text(text)
    assert train + held_out == text
    assert 0.05 <= len(held_out) / len(text) <= 0.15
    assert not (train.endswith('\r') and held_out.startswith('\n'))
    # A second reading of the rule: every place that leaves 10 to 15 % behind it.
    least, most = int(0.1 * len(text)), 0.15 * len(text)
    places = [n for n in range(len(text)) if least <= len(text) - n <= most]
    line_ends = [n for n in places if text[n - 1] == '\n']
    spaces = [n for n in places if text[n - 1].isspace() and text[n - 1 : n + 1] != '\r\n']
    if line_ends or spaces:
      assert len(train) == max(line_ends or spaces)


def test_a_short_text_is_trained_on_whole():
  for length in range(20):
    assert split_text('x' * length) == ('x' * length, '')


def test_a_heading_above_one_long_line_holds_out_a_tenth():
  text = 'A heading\n' + 'word ' * 20_000
  train, held_out = split_text(text)
  assert len(held_out) == pytest.approx(len(text) / 10, rel=0.01)
  assert train.endswith(' ')


def test_an_ordinary_text_is_cut_where_it_always_was():
  """So that runs of before go on: after the last line end of the first nine tenths."""
  draw = random.Random(0)
  text = ''.join('x' * draw.randrange(80) + '\n' for _ in range(2000))
  cut = text.rindex('\n', 0, len(text) - len(text) // 10) + 1
  assert split_text(text) == (text[:cut], text[cut:])


def test_files_of_a_title_and_a_paragraph_train_on_paragraphs(tmp_path):
  for n in range(40):
    (tmp_path / f'{n}.txt').write_text(f'Title {n}\n' + 'A sentence of the paragraph. ' * 20)
  train, held_out = load(tmp_path / '*.txt')
  assert len(train) == len(held_out) == 40
  assert all('paragraph' in text for text in train + held_out)


def test_a_byte_order_mark_is_no_text_and_windows_line_ends_are(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone\r\ntwo\r\n')
  (tmp_path / 'v.txt').write_text('new \ufeff\n')
  train, held_out = load(tmp_path / 'a.txt', validation_files=str(tmp_path / 'v.txt'))
  assert train == ['one\r\ntwo\r\n']
  assert held_out == ['new \ufeff\n']


def test_files_without_text_are_left_out(tmp_path):
  for name, text in [('a', ''), ('b', ' \n\t' * 30), ('c', 'a text that is long enough\n' * 9)]:
    (tmp_path / f'{name}.txt').write_text(text)
  train, held_out = load(tmp_path / '*.txt')
  assert len(train) == len(held_out) == 1
  assert train[0] + held_out[0] == (tmp_path / 'c.txt').read_text()


@pytest.mark.parametrize(
  ('content', 'named'),
  [
    (b'u\0t\0f\0', 'holds a NUL byte at 1, so it is UTF-16 or no text'),
    ('\ufeffutf'.encode('utf-16-le'), 'holds a NUL byte at 3'),
    (b' \n' * 100, 'data.files=.*holds no text'),
    (b'too short', 'last tenths .* 20 characters .*data.validation_files'),
    (b'text' * 100 + b'\n' * 100, 'last tenths .*hold no text'),
  ],
  ids=['nul', 'utf-16', 'white', 'short', 'white tail'],
)
def test_what_is_no_text_is_refused(tmp_path, content, named):
  (tmp_path / 'a.txt').write_bytes(content)
  refused(named, tmp_path / '*.txt', 'validation')


@pytest.mark.parametrize(
  ('content', 'named'),
  [
    (b'', 'data.validation_files=.*v.txt: what matches holds no text'),
    (b'caf\xe9', 'data.validation_files: .*v.txt is not UTF-8'),
    (None, 'data.validation_files=.*v.txt: no file matches'),
  ],
)
def test_the_field_at_fault_is_named(tmp_path, content, named):
  (tmp_path / 'a.txt').write_text('training text')
  if content is not None:
    (tmp_path / 'v.txt').write_bytes(content)
  refused(named, tmp_path / 'a.txt', 'validation', validation_files=str(tmp_path / 'v.txt'))


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('name', ['b.txt', 'link'])
def test_a_file_is_for_training_or_for_validation(tmp_path, split, name):
  for text in 'ab':
    (tmp_path / f'{text}.txt').write_text(text)
  (tmp_path / 'link').symlink_to('b.txt')
  fields = {'validation_files': str(tmp_path / name)}
  refused(f'data.validation_files=.*matches .*{name}', tmp_path / '*.txt', split, **fields)


def test_validation_files_alone_are_refused():
  refused('data.validation_files=v.txt: is read beside data.files', '', validation_files='v.txt')


def test_names_that_exist_are_taken_literally(tmp_path):
  folder = tmp_path / '[2024] *notes?'
  folder.mkdir()
  for name in ('[a].txt', 'a.txt', '日記 é.txt', 'x' * 251 + '.txt'):
    (folder / name).write_text(name)
  v = tmp_path / 'v'
  v.write_text('validation')

  def train(pattern):
    return load(folder / pattern, validation_files=str(v))[0]

  assert train('[a].txt') == ['[a].txt']
  assert train('[ab].txt') == ['a.txt']  # no such name, so a pattern
  assert train('日記 é.txt') == ['日記 é.txt']
  assert len(train('*.txt')) == 4
  assert len(load(tmp_path / '**/**/*.txt', validation_files=str(v))[0]) == 4  # each once


def test_a_file_counts_once_however_many_links_name_it(tmp_path):
  (tmp_path / 'a.txt').write_text('a text that is long enough')
  (tmp_path / 'b.txt').symlink_to('a.txt')
  os.link(tmp_path / 'a.txt', tmp_path / 'c.txt')
  train, held_out = load(tmp_path / '*.txt')
  assert [train[0] + held_out[0]] == ['a text that is long enough']
  refused('c.txt, which data.files', tmp_path / '[ab].txt', validation_files=f'{tmp_path}/c.txt')


def test_links_in_a_circle_end(tmp_path):
  """Two of them made 2**40 names of one file; a linked folder elsewhere is still read."""
  texts, elsewhere = tmp_path / 'texts', tmp_path / 'elsewhere'
  for folder, name in ((texts / 'in', 'a'), (elsewhere, 'b')):
    folder.mkdir(parents=True)
    (folder / f'{name}.txt').write_text(name)
  for name in ('x', 'y'):
    (texts / name).symlink_to('.')
  (texts / 'up').symlink_to('../texts')
  (texts / 'far').symlink_to(elsewhere)
  found = user_files.matches('data.files', f'{texts}/**/*.txt')
  assert [path.name for path in found] == ['b.txt', 'a.txt']


def test_patterns_mean_what_glob_means(tmp_path):
  for name in ('a.txt', '.hidden.txt', 'in/b.txt', 'in/er/c.txt', '.git/d.txt', 'in-a.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  for pattern in ('*.txt', '**/*.txt', '**/b.txt', '.*.txt', '*/*.txt', '.git/*', '[!.]*.txt'):
    for whole in (f'{tmp_path}/{pattern}', f'{tmp_path}/in/../{pattern}'):
      found = user_files.matches('data.files', whole)
      assert list(map(str, found)) == sorted(glob.glob(whole, recursive=True))


def test_a_folder_that_may_not_be_read_is_told(caplog):
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    for name in ('open', 'closed'):
      (Path(folder) / name).mkdir()
      (Path(folder) / name / 'a.txt').write_text(name)
    (Path(folder) / 'closed').chmod(0)
    with plain_user():
      for pattern in ('**/*.txt', '*/a.txt'):
        found = user_files.matches('data.files', f'{folder}/{pattern}')
        assert list(map(str, found)) == [f'{folder}/open/a.txt']
      for pattern in ('closed/a.txt', 'closed/*.txt'):
        refused(r'no file matches, .*closed .*\(Permission denied\)', f'{folder}/{pattern}')
  assert len(caplog.messages) == 2
  assert all('closed the first (Permission denied); nothing of it' in m for m in caplog.messages)


def test_a_file_larger_than_memory_is_the_machines_failure(tmp_path, monkeypatch):
  def too_large(path):
    raise MemoryError

  (tmp_path / 'a.txt').write_text('a text')
  monkeypatch.setattr(Path, 'read_bytes', too_large)
  with pytest.raises(MachineError, match='a.txt: cannot be read: there is too little memory'):
    texts_of(data_of(tmp_path / '*.txt'), 'train')


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('in the home folder ' * 9)
  assert ''.join(map(''.join, load('~/a.txt'))) == 'in the home folder ' * 9


@pytest.mark.parametrize(
  ('pattern', 'named'),
  [
    ('~nobody-of-that-name/*.txt', 'data.files=~nobody.*no home folder'),
    ('gs://bucket/*.txt', 'data.files=gs://bucket/.*gcsfuse'),
    ('a\0b/*.txt', 'data.files=a.*NUL character'),
    ('/nowhere/' + 'é' * 200, 'data.files=.*no file matches'),
    ('/dev/zer[o]', 'zero: is not a regular file; .*data.files'),
  ],
)
def test_names_that_cannot_be_are_one_line(pattern, named):
  refused(named, pattern)


@pytest.mark.parametrize('kind', ['folder', 'dangling', 'loop', 'pipe', 'socket'])
@pytest.mark.parametrize('field', ['files', 'validation_files'])
def test_what_is_no_file_is_named_and_hangs_nothing(tmp_path, kind, field, monkeypatch):
  monkeypatch.chdir(tmp_path)  # a socket's path is short
  Path('a.txt').write_text('a text')
  with contextlib.ExitStack() as stack:
    match kind:
      case 'folder':
        Path('odd').mkdir()
      case 'dangling':
        Path('odd').symlink_to('nothing')
      case 'loop':
        Path('odd').symlink_to('odd')
      case 'pipe':
        os.mkfifo('odd')
      case 'socket':
        stack.enter_context(socket.socket(socket.AF_UNIX)).bind('odd')
    fields = {'files': 'a.txt', 'validation_files': 'a.tx?', field: 'od?'}
    split = 'train' if field == 'files' else 'validation'
    refused(rf'(?=.*data\.{field}\b).*odd', fields.pop('files'), split, **fields)


def test_a_file_that_may_not_be_read_is_named():
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    path = Path(folder) / 'a.txt'
    path.write_text('secret')
    path.chmod(0)
    with plain_user():
      refused(r'a.txt: cannot be read \(Permission denied\).*data.files', f'{folder}/*.txt')
