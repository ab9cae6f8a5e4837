"""Prepared tokens are those of the documents one by one, whatever happened while they were made."""

import os
import random
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import break_as, plain_user, tiny_config

from mla.data import documents, pipeline, token_files
from mla.data.documents import Documents, pieces
from mla.data.pipeline import load_data
from mla.data.tokenizers import ByteTokenizer, make_tokenizer
from mla.errors import MachineError, UserError

WORDS = 'the state of the union is strong and its commerce large \u00e9 \U0001f99c'.split(' ')


def texts_for(seed: int, count: int) -> list[bytes]:
  draw = random.Random(seed)
  return [
    ' '.join(draw.choices([*WORDS, '\n', '\r\n'], k=draw.randrange(1, 90))).encode()
    for _ in range(count)
  ]


TEXTS = {'train': texts_for(1, 60), 'validation': texts_for(2, 9)}


def sources(texts=TEXTS) -> dict[str, Documents]:
  return {
    split: Documents(lambda _, raw=raw: iter(raw), stamps=[], nbytes=1, empty='none')
    for split, raw in texts.items()
  }


@pytest.fixture(params=['bytes', 'bpe:300'], scope='module')
def tokenizer(request, tmp_path_factory):
  return make_tokenizer(request.param, TEXTS['train'] * 9, tmp_path_factory.mktemp('bpe'))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(token_files, 'BATCH', 1000)


def expected(texts: list[bytes], tokenizer) -> list[int]:
  return [i for raw in texts for i in (tokenizer.bos, *tokenizer.encode(raw.decode()))]


def contents(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.tokens', '.documents')}


def test_tokens_documents_and_counts(tmp_path, tokenizer):
  store = token_files.make(tmp_path / 'store', sources(), tokenizer, {})
  for split, texts in TEXTS.items():
    tokens = store.tokens[split]
    assert tokens.dtype == np.uint16 and isinstance(tokens, np.memmap)
    assert tokens.tolist() == expected(texts, tokenizer)
    rows = np.fromfile(tmp_path / 'store' / f'{split}.documents', token_files.ROW)
    assert np.all(tokens[rows['token']] == tokenizer.bos)
    assert rows['bytes'].tolist() == list(map(len, texts))
    counts = store.manifest['splits'][split]
    assert counts['documents'] == len(texts) and counts['tokens'] == len(tokens)
    assert counts['bytes'] == sum(map(len, texts))
    assert counts['digest'] == documents.digest(texts)


@pytest.mark.parametrize(
  ('vocab', 'dtype'), [(256, 'u1'), (257, 'u2'), (65536, 'u2'), (65537, 'u4')]
)
def test_the_smallest_dtype_that_holds_the_vocabulary(vocab, dtype):
  assert token_files.dtype_of(vocab) == np.dtype(dtype)


@pytest.mark.parametrize('batches', [1, 2, 5])
def test_one_that_was_stopped_goes_on_to_the_same_files(tmp_path, tokenizer, batches):
  token_files.make(tmp_path / 'whole', sources(), tokenizer, {})
  left = iter([False] * (batches - 1) + [True] * 99)
  with pytest.raises(token_files.Stopped):
    token_files.make(tmp_path / 'cut', sources(), tokenizer, {}, lambda: next(left))
  assert token_files.find(tmp_path / 'cut') is None
  # What a kill leaves: more in the files than the journal says, and half a line in that.
  for name, junk in [
    ('train.tokens', b'xyz'),
    ('train.documents', b'z'),
    ('train.journal', b'{"p'),
  ]:
    with open(tmp_path / 'cut' / name, 'ab') as file:
      file.write(junk)
  encoded = []

  class Counting(type(tokenizer)):
    def encode_batch(self, texts):
      encoded.extend(texts)
      return super().encode_batch(texts)

  again = object.__new__(Counting)
  again.__dict__.update(tokenizer.__dict__)
  token_files.make(tmp_path / 'cut', sources(), again, {})
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
  assert 0 < len(encoded) < sum(map(len, TEXTS.values()))  # not what was done


def test_what_was_begun_with_another_text_begins_anew(tmp_path):
  tokenizer = ByteTokenizer()
  left = iter([False, False, True])
  with pytest.raises(token_files.Stopped):
    token_files.make(tmp_path / 's', sources(), tokenizer, {}, lambda: next(left))
  other = {**TEXTS, 'train': [b'another', *TEXTS['train'][1:]]}
  store = token_files.make(tmp_path / 's', sources(other), tokenizer, {})
  assert store.tokens['train'].tolist() == expected(other['train'], tokenizer)
  (tmp_path / 's' / 'manifest.json').unlink()
  shorter = {**TEXTS, 'train': [b'but one']}
  store = token_files.make(tmp_path / 's', sources(shorter), tokenizer, {})
  assert store.tokens['train'].tolist() == expected(shorter['train'], tokenizer)


def test_two_at_once_do_the_work_once(tmp_path):
  read = []

  def reading(split):
    def read_all(_):
      read.append(split)
      yield from TEXTS[split]

    return Documents(read_all, stamps=[], nbytes=1, empty='none')

  def work():
    both = {split: reading(split) for split in TEXTS}
    stores.append(token_files.make(tmp_path / 's', both, ByteTokenizer(), {}))

  stores: list = []
  workers = [threading.Thread(target=work) for _ in range(2)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert sorted(read) == ['train', 'validation'] and len(stores) == 2


DAMAGES = ['gone', 'folder', 'torn', b'', b'null', b'{}', b'noise']


@pytest.mark.parametrize('name', ['train.tokens', 'validation.documents', 'manifest.json'])
@pytest.mark.parametrize('damage', DAMAGES, ids=str)
def test_a_damaged_store_is_noticed_and_made_again(tmp_path, caplog, name, damage):
  folder = tmp_path / 's'
  token_files.make(folder, sources(), ByteTokenizer(), {})
  whole = contents(folder)
  break_as(folder / name, damage)
  if (
    name == 'manifest.json' and damage == 'bit'
  ):  # a bit in its midst may be in a digit that counts
    json.loads((folder / name).read_text())
    return
  if damage == 'folder':
    with pytest.raises(UserError, match=r'tokens cannot be kept|is a folder|irectory'):
      token_files.make(folder, sources(), ByteTokenizer(), {})
    return
  assert token_files.find(folder) is None
  token_files.make(folder, sources(), ByteTokenizer(), {})
  assert contents(folder) == whole and token_files.find(folder) is not None
  assert ('made again' in caplog.text) == (damage != 'gone' or name != 'manifest.json')


def test_a_flipped_bit_is_noticed(tmp_path):
  token_files.make(tmp_path, sources(), ByteTokenizer(), {})
  break_as(tmp_path / 'train.tokens', 'bit')
  assert token_files.find(tmp_path) is None


def test_files_that_were_only_copied_are_kept(tmp_path):
  folder = tmp_path / 's'
  token_files.make(folder, sources(), ByteTokenizer(), {})
  for path in folder.iterdir():
    os.utime(path, (1, 1))
  assert token_files.find(folder) is not None


def test_no_room_and_no_right_are_told_in_one_line(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
  try:
    with pytest.raises(MachineError, match='tokens cannot be kept in .*file size'):
      token_files.make(tmp_path / 's', sources(), ByteTokenizer(), {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  store = token_files.make(tmp_path / 's', sources(), ByteTokenizer(), {})
  assert store.tokens['train'].tolist() == expected(TEXTS['train'], ByteTokenizer())
  os.chmod(tmp_path, 0o555)
  with plain_user(), pytest.raises(UserError, match='data.data_dir: .*Permission denied'):
    token_files.make(tmp_path / 'in' / 's', sources(), ByteTokenizer(), {})


def test_a_large_text_gives_what_a_small_one_does(tmp_path, monkeypatch, text):
  """The tokens, the digest that identifies a run, and the order of the batches."""
  config = tiny_config(data__files=str(text), data__data_dir=str(tmp_path))
  small = load_data(config)
  monkeypatch.setattr(pipeline, 'SMALL', 0)
  large = load_data(config)
  assert isinstance(large.train.tokens, np.memmap)
  assert large.digest == small.digest
  first = (
    next(pipeline.train_batches(data.train, seq_len=9, batch_size=4, seed=0))
    for data in (small, large)
  )
  np.testing.assert_array_equal(*first)


def test_a_second_start_reads_no_text(tmp_path, monkeypatch, text):
  config = tiny_config(
    data__files=str(text), data__data_dir=str(tmp_path), data__tokenizer='bpe:300'
  )
  first = load_data(config)
  monkeypatch.setattr(Documents, '__iter__', lambda self: pytest.fail('the text is read'))
  second = load_data(config)
  assert second.digest == first.digest and second.tokenizer.digest == first.tokenizer.digest
  np.testing.assert_array_equal(second.train.tokens, first.train.tokens)


def test_another_text_under_the_same_name_is_another_store(tmp_path):
  path = tmp_path / 'a.txt'
  digests = []
  for content in ('one and the same\n' * 40, 'some other text!\n' * 40):
    path.write_text(content)
    config = tiny_config(
      data__files=str(path), data__data_dir=str(tmp_path), data__tokenizer='bpe:280'
    )
    digests.append(load_data(config).digest)
  assert digests[0] != digests[1]


@pytest.mark.parametrize('size', [4, 10, 57])
def test_an_enormous_document_is_tokenized_in_pieces(monkeypatch, tmp_path, tokenizer, size):
  monkeypatch.setattr(documents, 'PIECE', size)
  for raw in TEXTS['train']:
    parts = list(pieces(raw))
    assert ''.join(parts).encode() == raw
    assert max(len(part.encode()) for part in parts) <= size
  assert list(pieces(b'')) == ['']
  store = token_files.make(tmp_path / 's', sources(), tokenizer, {})
  total = sum(map(len, TEXTS['train']))
  assert tokenizer.byte_lengths[store.tokens['train']].sum() == total
  assert np.sum(store.tokens['train'] == tokenizer.bos) == len(TEXTS['train'])
  if isinstance(tokenizer, ByteTokenizer):
    assert store.tokens['train'].tolist() == expected(TEXTS['train'], tokenizer)


def test_cut_after_a_lines_end_bpe_is_the_same(monkeypatch, tmp_path):
  lines = [b'\n'.join([b'the state of the union ' * 2] * 30)]
  tokenizer = make_tokenizer('bpe:280', lines, tmp_path)
  whole = expected(lines, tokenizer)
  monkeypatch.setattr(documents, 'PIECE', 100)
  both = sources({'train': lines, 'validation': lines})
  store = token_files.make(tmp_path / 's', both, tokenizer, {})
  assert store.tokens['train'].tolist() == whole
