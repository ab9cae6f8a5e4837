"""Prepared tokens are those of the documents one by one, whatever happened while they were made."""

import errno
import gzip
import json
import os
import random
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import break_as, plain_user, tiny_config

from mla import files, signals
from mla.data import bpe, documents, pipeline, token_files, tokenizers
from mla.data.documents import Documents, pieces
from mla.data.pipeline import load_data
from mla.data.tokenizers import ByteTokenizer
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
def tokenizer(request):
  return tokenizers.ready(request.param) or tokenizers.train(request.param, TEXTS['train'] * 9)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(token_files, 'BATCH', 1000)


def make(folder: Path, both, tokenizer, *stopping) -> token_files.Store:
  return token_files.make(folder, both, lambda: tokenizer, *stopping)


def expected(texts: list[bytes], tokenizer) -> list[int]:
  return [i for raw in texts for i in (tokenizer.bos, *tokenizer.encode(raw.decode()))]


def contents(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.tokens', '.documents')}


def test_tokens_documents_and_counts(tmp_path, tokenizer):
  store = make(tmp_path / 'store', sources(), tokenizer)
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
  make(tmp_path / 'whole', sources(), tokenizer)
  left = iter([False] * (batches - 1) + [True] * 99)
  with pytest.raises(signals.Stopped):
    make(tmp_path / 'cut', sources(), tokenizer, lambda: next(left))
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
    def encode_batch(self, parts, begins):
      encoded.extend(parts)
      return super().encode_batch(parts, begins)

  again = object.__new__(Counting)
  again.__dict__.update(tokenizer.__dict__)
  make(tmp_path / 'cut', sources(), again)
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
  assert 0 < len(encoded) < sum(map(len, TEXTS.values()))  # not what was done


def test_what_was_begun_with_another_text_begins_anew(tmp_path):
  tokenizer = ByteTokenizer()
  left = iter([False, False, True])
  with pytest.raises(signals.Stopped):
    make(tmp_path / 's', sources(), tokenizer, lambda: next(left))
  other = {**TEXTS, 'train': [b'another', *TEXTS['train'][1:]]}
  store = make(tmp_path / 's', sources(other), tokenizer)
  assert store.tokens['train'].tolist() == expected(other['train'], tokenizer)
  (tmp_path / 's' / 'manifest.json').unlink()
  shorter = {**TEXTS, 'train': [b'but one']}
  store = make(tmp_path / 's', sources(shorter), tokenizer)
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
    stores.append(make(tmp_path / 's', both, ByteTokenizer()))

  stores: list = []
  workers = [threading.Thread(target=work) for _ in range(2)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert sorted(read) == ['train', 'validation'] and len(stores) == 2


DAMAGES = ['gone', 'folder', 'torn', 'bit', b'', b'null', b'{}', b'noise']


@pytest.mark.parametrize('name', ['train.tokens', 'validation.documents', 'manifest.json'])
@pytest.mark.parametrize('damage', DAMAGES, ids=str)
def test_a_damaged_store_is_noticed_and_made_again(tmp_path, caplog, name, damage):
  folder = tmp_path / 's'
  make(folder, sources(), ByteTokenizer())
  whole = contents(folder)
  break_as(folder / name, damage)
  if damage == 'bit' and name == 'manifest.json':  # it may be in a count that nothing needs
    assert token_files.find(folder) is None or contents(folder) == whole
    return
  if damage == 'folder':
    with pytest.raises(UserError, match=r'tokens cannot be kept|is a folder|irectory'):
      make(folder, sources(), ByteTokenizer())
    return
  assert token_files.find(folder) is None
  make(folder, sources(), ByteTokenizer())
  assert contents(folder) == whole and token_files.find(folder) is not None
  assert ('made again' in caplog.text) == (damage != 'gone' or name != 'manifest.json')


def test_journals_that_a_kill_left_vouch_for_no_damaged_file(tmp_path, monkeypatch):
  journals = {}
  write_manifest = token_files._write_manifest

  def noting(folder, *rest):
    journals.update({path: path.read_bytes() for path in folder.glob('*.journal')})
    write_manifest(folder, *rest)

  monkeypatch.setattr(token_files, '_write_manifest', noting)
  make(tmp_path, sources(), ByteTokenizer())
  whole = contents(tmp_path)
  for path, content in journals.items():  # killed before they were removed
    path.write_bytes(content)
  mapped = token_files.find(tmp_path).tokens['train']
  break_as(tmp_path / 'train.tokens', 'bit')
  make(tmp_path, sources(), ByteTokenizer())
  assert len(journals) == 2 and contents(tmp_path) == whole
  assert mapped.tolist() == expected(TEXTS['train'], ByteTokenizer())  # somebody's, not cut short


def test_a_store_that_can_only_be_read_is_whole(tmp_path, monkeypatch, caplog):
  make(tmp_path, sources(), ByteTokenizer())
  for path in tmp_path.iterdir():
    os.utime(path, (1, 1))

  def refuse(path, content):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(files, 'write_whole', refuse)
  assert token_files.find(tmp_path) is not None and not caplog.messages


def test_a_signal_ends_the_waiting_for_another_process(tmp_path):
  with files.lease(tmp_path / token_files.LOCK, ''), pytest.raises(signals.Stopped):
    make(tmp_path, sources(), ByteTokenizer(), lambda: True)


def test_files_that_were_only_copied_are_kept(tmp_path):
  folder = tmp_path / 's'
  make(folder, sources(), ByteTokenizer())
  for path in folder.iterdir():
    os.utime(path, (1, 1))
  assert token_files.find(folder) is not None


def test_no_room_and_no_right_are_told_in_one_line(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
  try:
    with pytest.raises(MachineError, match='tokens cannot be kept in .*file size'):
      make(tmp_path / 's', sources(), ByteTokenizer())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  store = make(tmp_path / 's', sources(), ByteTokenizer())
  assert store.tokens['train'].tolist() == expected(TEXTS['train'], ByteTokenizer())
  os.chmod(tmp_path, 0o555)
  with plain_user(), pytest.raises(UserError, match='data.data_dir: .*Permission denied'):
    make(tmp_path / 'in' / 's', sources(), ByteTokenizer())


def test_a_large_text_gives_what_a_small_one_does(tmp_path, monkeypatch, text):
  """The tokens, the digest that identifies a run, and the order of the batches."""
  config = tiny_config(data__files=str(text), data__data_dir=str(tmp_path))
  small = load_data(config)
  monkeypatch.setattr(pipeline, 'SMALL', 0)
  large = load_data(config)
  assert isinstance(large.train.tokens, np.memmap)
  assert large.digest == small.digest
  first = (
    next(pipeline.train_batches(data.train, seq_len=9, batch_size=4, seed=0)).tokens
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


def test_packed_text_is_as_large_as_it_is_unpacked(tmp_path, monkeypatch):
  """And is not counted twice where both splits are of the same files."""
  path = tmp_path / 'a.jsonl.gz'
  line = json.dumps({'text': 'all the same ' * 10}).encode() + b'\n'
  path.write_bytes(gzip.compress(line * 100))
  config = tiny_config(data__files=str(path), data__data_dir=str(tmp_path))
  for limit, mapped in ((path.stat().st_size, True), (12_999, True), (13_000, False)):
    monkeypatch.setattr(pipeline, 'SMALL', limit)
    assert isinstance(load_data(config).train.tokens, np.memmap) == mapped


def bpe_config(tmp_path, text, **fields):
  return tiny_config(
    data__files=str(text), data__data_dir=str(tmp_path), data__tokenizer='bpe:300', **fields
  )


def test_a_mistake_in_the_text_is_told_once(tmp_path, caplog):
  (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n' * 40 + '{"text": 2}\n')
  with pytest.raises(UserError, match='no such text in line 41'):
    load_data(bpe_config(tmp_path, tmp_path / 'a.jsonl'))
  assert not caplog.messages  # of keeping nothing


def test_where_nothing_can_be_kept_a_small_text_is_tokenized_anew(tmp_path, text, caplog):
  kept = load_data(bpe_config(tmp_path, text))
  (tmp_path / 'file').write_text('no folder')
  anew = load_data(bpe_config(tmp_path / 'file', text))
  assert 'tokens cannot be kept in' in caplog.text and 'anew at every start' in caplog.text
  assert anew.digest == kept.digest and anew.tokenizer.digest == kept.tokenizer.digest
  np.testing.assert_array_equal(anew.train.tokens, kept.train.tokens)


def test_a_tokenizer_is_trained_once(tmp_path, text, monkeypatch):
  """By two that start together, and by one that is stopped and goes on."""
  trained = []
  train = bpe.train

  def noting(*given):
    trained.append(given)
    return train(*given)

  monkeypatch.setattr(bpe, 'train', noting)
  threads = [
    threading.Thread(target=load_data, args=(bpe_config(tmp_path, text),)) for _ in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(trained) == 1
  config = bpe_config(tmp_path / 'other', text)
  with pytest.raises(signals.Stopped):
    load_data(config, lambda: len(list(tmp_path.glob(f'other/*/*/{bpe.KEPT}'))) > 0)
  assert len(trained) == 2
  load_data(config)
  assert len(trained) == 2


def test_training_a_tokenizer_can_be_stopped():
  with pytest.raises(signals.Stopped):
    bpe.train(300, TEXTS['train'], lambda: True)
  asked = iter([False] * len(TEXTS['train']) + [True])  # within SentencePiece
  with pytest.raises(signals.Stopped):
    bpe.train(300, TEXTS['train'], lambda: next(asked))


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
    assert b''.join(parts) == raw
    assert all(part.decode() for part in parts) and max(map(len, parts)) <= size
  assert list(pieces(b'')) == [b'']
  store = make(tmp_path / 's', sources(), tokenizer)
  total = sum(map(len, TEXTS['train']))
  assert tokenizer.byte_lengths[store.tokens['train']].sum() == total
  assert np.sum(store.tokens['train'] == tokenizer.bos) == len(TEXTS['train'])
  if isinstance(tokenizer, ByteTokenizer):
    assert store.tokens['train'].tolist() == expected(TEXTS['train'], tokenizer)
  # Where nothing can be kept they are those of the store.
  in_memory = pipeline.make_stream(TEXTS['train'], tokenizer).tokens
  np.testing.assert_array_equal(in_memory, store.tokens['train'], strict=True)


def test_cut_after_a_lines_end_bpe_is_the_same(monkeypatch, tmp_path):
  lines = [b'\n'.join([b'the state of the union ' * 2] * 30)]
  tokenizer = tokenizers.train('bpe:280', lines)
  whole = expected(lines, tokenizer)
  monkeypatch.setattr(documents, 'PIECE', 100)
  both = sources({'train': lines, 'validation': lines})
  store = make(tmp_path / 's', both, tokenizer)
  assert store.tokens['train'].tolist() == whole
