"""All trials of a sweep read one text in one tokenizer: nats a token of others are another unit."""

from pathlib import Path

import pytest
import test_results

from mla.errors import UserError
from mla.sweep import frontier, results, trials
from mla.sweep import run as sweep


def test_results_over_another_text_are_not_set_beside_these(tmp_path):
  text = tmp_path / 'text.txt'
  todo = test_results.expand('seed=0,1', **{'data.files': str(text)})

  def lines(words: str, folder: Path) -> list[dict]:
    text.write_text(words * 200)
    return trials.check(todo, folder, on_these_devices=False)

  first, second = lines('one text of words\n', tmp_path / 'new')
  sweep.Results(folder := test_results.make_folder(tmp_path / 'sweep')).add(
    {**test_results.without_costs(todo[0]), 'data_digest': first['data_digest']}
  )
  sweep.check_text([second], folder)
  changed = lines('another text of words\n', folder)[1]
  with pytest.raises(UserError, match='the text or the tokenizer is not what'):
    sweep.check_text([changed], folder)
  # A worker whose copy of the text differs.
  line = {**test_results.without_costs(todo[1]), 'data_digest': changed['data_digest']}
  test_results.run(todo, folder, lambda trial: line)
  (failed,) = [
    found for found in results.read_lines(folder / 'results.jsonl') if found['seed'] == 1
  ]
  assert failed['status'] == 'failed' and 'not that of trial seed=0' in failed['error']


def test_trials_of_unlike_tokens_are_refused_before_they_train(tmp_path):
  """A token of four bytes costs more nats than one of one: no cache has anything to do with it."""
  text = tmp_path / 'text.txt'
  text.write_text(
    'some words of a text, and some more of them, with quite different letters\n' * 200
  )
  todo = [
    *test_results.expand('seed=0', **{'data.files': str(text)}),
    *test_results.expand('seed=1', **{'data.files': str(text), 'data.tokenizer': 'bpe:300'}),
  ]
  lines = trials.check(todo, tmp_path / 'new', on_these_devices=False)
  with pytest.raises(UserError, match='nats a token') as error:
    sweep.check_text(lines, tmp_path / 'new')
  assert 'data.tokenizer=' in str(error.value) and 'bpe:300' in str(error.value)
  # One kind is done already.
  folder = test_results.make_folder(tmp_path / 'sweep')
  sweep.Results(folder).add(
    {**test_results.without_costs(todo[0]), 'data_digest': lines[0]['data_digest']}
  )
  with pytest.raises(UserError, match='nats a token'):
    sweep.check_text(lines[1:], folder)


def test_what_tells_two_texts_apart_is_named():
  """With the default of fields that an older line lacks; nothing that changes no token."""
  line = {'settings': {'seq_len': 64, 'data.dataset': 'probe:payload'}, 'fields': {}}
  records = {**line, 'fields': {'data.records': 8, 'data.eval_tokens': 64, 'data.packing': 'x'}}
  assert results.told_apart(records, line) == 'data.records=8 or 16'
  longer = {**line, 'fields': {'seq_len': 128}}
  assert results.told_apart(line, longer) == 'seq_len=64 or 128'
  text = {'settings': {'seq_len': 64, 'data.dataset': 'sotu'}, 'fields': {}}
  assert results.told_apart(text, {**text, 'fields': {'seq_len': 128}}) == ''


def test_no_report_is_made_of_trials_of_unlike_tokens(tmp_path):
  """Such as an older version let stand beside each other."""
  todo, kept = (
    test_results.expand('latent_dim=4,8'),
    sweep.Results(test_results.make_folder(tmp_path / 'sweep')),
  )
  for trial, digest in zip(todo, ('0a', '0b'), strict=True):
    kept.add({**test_results.without_costs(trial), 'data_digest': digest})
  with pytest.raises(UserError, match='nats a token'):
    frontier.summarise(tmp_path / 'sweep')
