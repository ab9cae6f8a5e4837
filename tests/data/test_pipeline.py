import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import tiny_config

from mla.data.pipeline import TokenStream, eval_windows, load_data, make_stream, train_batches
from mla.data.tokenizers import ByteTokenizer
from mla.errors import UserError

STREAM = TokenStream(np.arange(1000, dtype=np.int32))  # every token tells its place
SIZES = {'seq_len': 9, 'batch_size': 4}


def starts(batch):
  np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(10))
  return sorted(batch[:, 0].tolist())


def take(batches, count):
  return [next(batches).tokens for _ in range(count)]


def test_documents_start_with_bos():
  stream = make_stream([b'ab', b'c'], ByteTokenizer())
  np.testing.assert_array_equal(stream.tokens, [256, 97, 98, 256, 99])


def test_an_epoch_covers_every_window_once_and_the_next_is_shuffled_anew():
  batches = train_batches(STREAM, seed=3, seq_len=9, batch_size=3)  # 111 windows, 37 batches
  first, second = (np.concatenate(take(batches, 37)) for _ in range(2))
  assert starts(first) == starts(second) == list(range(0, 999, 9))
  assert first[:, 0].tolist() != second[:, 0].tolist()


def test_the_seed_alone_decides():
  def one(seed):
    return np.stack(take(train_batches(STREAM, seed=seed, **SIZES), 5))

  np.testing.assert_array_equal(one(1), one(1))
  assert not np.array_equal(one(1), one(2))


def test_a_process_reads_its_rows_of_the_very_batches_of_one():
  alone = train_batches(STREAM, seed=0, **SIZES)
  rows = [np.array([0, 3]), np.array([1, 2]), np.array([1, 2, 3])]  # two may read the same
  parts = [train_batches(STREAM, seed=0, rows=chosen, **SIZES) for chosen in rows]
  for _ in range(60):  # beyond an epoch
    whole = next(alone).tokens
    for chosen, part in zip(rows, parts, strict=True):
      np.testing.assert_array_equal(next(part).tokens, whole[chosen])


def test_a_restored_position_gives_the_same_batches(tmp_path):
  batches = train_batches(STREAM, seed=0, **SIZES)
  take(batches, 17)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(17, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
    manager.wait_until_finished()
    expected = take(batches, 30)
    fresh = train_batches(STREAM, seed=0, **SIZES)
    arguments = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
    manager.restore(17, args=arguments)
  np.testing.assert_array_equal(np.stack(take(fresh, 30)), np.stack(expected))


@pytest.mark.parametrize('length', [2, 9, 10, 11, 100])
def test_every_token_but_the_first_is_a_target_once(length):
  windows = eval_windows(TokenStream(STREAM.tokens[:length]), seq_len=9)
  assert windows.tokens[:, 1:][windows.mask].tolist() == list(range(1, length))
  inputs = windows.tokens[:, :-1][windows.mask]
  np.testing.assert_array_equal(inputs + 1, windows.tokens[:, 1:][windows.mask])


def test_a_part_of_the_windows_is_spread_evenly():
  windows = eval_windows(STREAM, seq_len=9, max_tokens=90)
  chosen = windows.tokens[:, 0]
  assert len(chosen) == 10
  assert chosen[0] == 0
  assert np.ptp(np.diff(chosen)) <= 9


def test_too_little_text_is_refused():
  with pytest.raises(UserError, match='batch_size=4: .* 3 windows of seq_len=9'):
    train_batches(TokenStream(STREAM.tokens[:30]), seed=0, **SIZES)
  with pytest.raises(UserError, match='no token to predict'):
    eval_windows(TokenStream(STREAM.tokens[:1]), seq_len=9)


@pytest.mark.parametrize(('copies', 'told'), [(0, ''), (1, '1 of 2 validation documents')])
def test_a_text_in_training_and_validation_is_told(tmp_path, caplog, copies, told):
  """Two files of one content; a file of both globs is refused."""
  texts = {'a.txt': 'a text', 'b.txt': 'more', 'x.val': 'held out', 'y.val': 'another'}
  texts |= {'y.val': 'a text'} if copies else {}
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  fields = {'data__files': f'{tmp_path}/*.txt', 'data__validation_files': f'{tmp_path}/*.val'}
  load_data(tiny_config(**fields))
  assert told in caplog.text and bool(caplog.messages) == bool(copies)


@pytest.mark.parametrize('folder', ['file', 'closed', 'gs://bucket'])
def test_files_in_bytes_need_no_data_dir(tmp_path, folder):
  (tmp_path / 'file').write_text('a text that is long enough\n' * 9)
  (tmp_path / 'closed').mkdir(mode=0)
  where = folder if ':' in folder else f'{tmp_path}/{folder}'
  data = load_data(tiny_config(data__files=f'{tmp_path}/file', data__data_dir=where))
  assert len(data.train.tokens) + len(data.validation.tokens) == 27 * 9 + 2
  assert (tmp_path / 'file').is_file()
