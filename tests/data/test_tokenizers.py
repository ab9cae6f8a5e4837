import os
import random
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import break_as, plain_user

from mla.data.tokenizers import make_tokenizer
from mla.errors import MachineError, UserError

TEXT = [
  'The president spoke to the congress of the several states about peace and commerce.\n' * 30,
  'Fellow citizens of the senate, I lay before you measures of necessary expediency. ' * 30,
]
RAW = [text.encode() for text in TEXT]
NASTY = [
  '',
  ' ',
  '  two  spaces  ',
  'tab\tand\r\nlines\n\n',
  'a \u2581 block \u2581\u2581',
  '\u2581',
  'nul \0 byte',
  'emoji 🦜🇫🇷 and é',
  '<0x41> <s> <unk> \u2047',
  '\ufeff\u200b\u00a0',
  'ﬁ ﬀ Å ①',  # normalisation would change these
]


def random_texts():
  draw = random.Random(0)
  points = [p for p in range(0x3000) if not 0xD800 <= p < 0xE000] + list(range(0x1F300, 0x1F600))
  return [''.join(chr(draw.choice(points)) for _ in range(draw.randrange(80))) for _ in range(50)]


@pytest.fixture(scope='module', params=['bytes', 'bpe:400'])
def tokenizer(request, tmp_path_factory):
  return make_tokenizer(request.param, RAW, tmp_path_factory.mktemp('tokenizers'))


def test_round_trip_is_lossless(tokenizer):
  for text in NASTY + random_texts() + TEXT:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_ids_and_bos_are_in_the_vocabulary(tokenizer):
  ids = np.concatenate([tokenizer.encode(text) for text in NASTY])
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
  assert tokenizer.bos not in ids
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.byte_lengths[tokenizer.bos] == 0
  assert tokenizer.decode(np.array([tokenizer.bos, *tokenizer.encode('x')])) == 'x'


def test_bpe_has_the_asked_size_and_compresses(tmp_path):
  tokenizer = make_tokenizer('bpe:400', RAW, tmp_path)
  assert tokenizer.vocab_size == 400
  assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) / 3


def test_bpe_is_trained_once_and_again_if_its_file_is_broken(tmp_path):
  first = make_tokenizer('bpe:400', RAW, tmp_path)
  (path,) = tmp_path.iterdir()
  written = path.stat().st_mtime_ns
  assert make_tokenizer('bpe:400', RAW, tmp_path).digest == first.digest
  assert path.stat().st_mtime_ns == written
  path.write_bytes(b'broken')
  assert make_tokenizer('bpe:400', RAW, tmp_path).digest == first.digest
  make_tokenizer('bpe:400', [*RAW, b'another text'], tmp_path)
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('spec', ['', 'words', 'bpe', 'bpe:', 'bpe:abc', 'bpe:10', 'bpe:900000'])
def test_a_bad_spec_is_one_line(tmp_path, spec):
  with pytest.raises(UserError, match='data.tokenizer=') as caught:
    make_tokenizer(spec, RAW, tmp_path)
  assert '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """A folder with a kept model, and the model's digest."""
  folder = tmp_path_factory.mktemp('kept')
  return folder, make_tokenizer('bpe:400', RAW, folder).digest


@pytest.mark.parametrize('damage', [b'', b'null', b'\0' * 3000, 'torn', 'bit', 'pipe', 'link'])
def test_a_damaged_kept_model_is_trained_again(kept, tmp_path, damage):
  shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  break_as(path, damage)
  (tmp_path / 'notes').write_text('ten years of work')
  assert make_tokenizer('bpe:400', RAW, tmp_path).digest == kept[1]
  assert path.read_bytes() == whole
  assert {p.name for p in tmp_path.iterdir()} == {path.name, 'notes'}


def test_a_folder_in_a_kept_models_place_is_left(kept, tmp_path, caplog):
  shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
  (path,) = tmp_path.iterdir()
  break_as(path, 'folder')
  assert make_tokenizer('bpe:400', RAW, tmp_path).digest == kept[1]
  assert path.is_dir() and len(list(tmp_path.iterdir())) == 1
  assert 'cannot keep the tokenizer in' in caplog.text


def test_where_nothing_can_be_kept_a_tokenizer_is_trained(kept, caplog):
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o555)
    with plain_user():
      assert make_tokenizer('bpe:400', RAW, Path(folder) / 'in').digest == kept[1]
  assert 'cannot keep the tokenizer in' in caplog.text and 'Permission denied' in caplog.text


def test_a_full_disk_leaves_no_half_of_a_model(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(MachineError, match='cannot keep the tokenizer in .*file size'):
      make_tokenizer('bpe:400', RAW, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert list(tmp_path.iterdir()) == []
