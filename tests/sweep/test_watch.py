"""What a sweep tells of its running trials."""

import io
import time

import pytest
from conftest import tiny_config

from mla.sweep import watch
from mla.sweep.trials import Trial


@pytest.fixture
def trial(tmp_path):
  (tmp_path / 'trials' / 'one').mkdir(parents=True)
  return Trial('one', 'mla', {}, tiny_config(num_steps=40, batch_size=2, seq_len=16))


@pytest.mark.parametrize('begun', ['', '\n', '{"step": 1'], ids=['empty', 'blank', 'torn'])
def test_a_trial_that_has_no_line_yet_does_not_end_the_telling(
  begun, trial, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(watch, 'IN_A_PIPE', 0.02)
  metrics = tmp_path / 'trials' / 'one' / 'metrics.jsonl'
  with watch.Watch([trial], tmp_path, print):
    metrics.write_text(begun)
    time.sleep(0.2)  # some ten lines' time
    assert not capsys.readouterr().out
    metrics.write_text('{"step": 10, "tokens_per_second": 96}\n')
    deadline, told = time.monotonic() + 10, ''
    while not told and time.monotonic() < deadline:
      time.sleep(0.02)
      told = capsys.readouterr().out
  assert told.splitlines()[0] == 'one: step 10/40, 0:10 left'


def test_a_line_that_stays_is_written_at_once(trial, tmp_path, monkeypatch):
  """A file or a pipe would keep it back until some kilobytes are full."""
  file = io.BytesIO()
  monkeypatch.setattr('sys.stdout', io.TextIOWrapper(file, line_buffering=False))
  watch.Watch([trial], tmp_path, print).say('[1/2] one')
  assert file.getvalue() == b'[1/2] one\n'
