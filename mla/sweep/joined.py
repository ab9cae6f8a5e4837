"""Runs that the sweep did not train, as arms of its report: imported ones, compressed, healed.

report.py --run=W. Such a run is read as a trial is, through the same cache on as many targets of
its own data.*, and is an arm of one seed. How it came to be is its own: nothing of it is compared
but loss and bytes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla import checksums
from mla.checkpoint import Checkpoints
from mla.errors import UserError
from mla.sweep import run, trials
from mla.sweep.results import JOINED, Results, read_lines
from mla.workdir import read_config


def join(folder: Path, workdir: Path) -> dict[str, Any]:
  """Reads the run and keeps its line with the sweep's, in place of an earlier one; returns it.

  Its arm is called as the run's folder. The sweep's folder is made if need be, and kept from other
  sweeps meanwhile. UserError if the folder is none, is at work, has another arm of that name or
  these weights by another, or has read another text or other tokens or does not say which; Diverged
  if the run's loss is not finite.
  """
  config = read_config(workdir, 'run')
  if not Checkpoints(workdir).steps():
    raise UserError(f'--run={workdir}: the run has no checkpoint yet; train it first')
  trials.check_folder(folder)
  name = trials.file_name(workdir.absolute().name)
  learned = trials.learned(config, workdir)
  which = trials.hash_of(learned)
  with run.lease_sweep(folder):
    there = read_lines(folder / 'results.jsonl')
    for line in there:
      if name in (line['trial'], line['arm']) and line.get(JOINED) != which:
        raise UserError(f'--run={workdir}: the sweep has another arm {name}; rename the folder')
    if there and not any('data_digest' in line for line in there):
      raise UserError(
        f'{folder}: its results, of an older version, do not say which text they are of, so that '
        f'--run={workdir} might be of another; give a --workdir of its own'
      )
    targets = _targets(there) or config.data.eval_tokens
    scored = run.score(workdir, targets)
    weights = {**learned, 'weights': _weights(workdir, scored['step'])}
    line = {
      'trial': name,
      'arm': name,
      'seed': config.seed,
      'learning_rate': config.learning_rate,
      'fields': {},
      'digest': trials.hash_of(weights),
      'arm_digest': trials.hash_of({**weights, 'eval_tokens': targets}),
      # What decides what is read of it; the rest of its config is no setting of this sweep.
      'settings': {
        **{key: value for key, value in learned.items() if key.startswith('data.')},
        'data.eval_tokens': targets,
        'seq_len': config.seq_len,
      },
      **scored,
      'tokens_per_second': None,
      JOINED: which,
    }
    results = Results(folder)
    other = results.other_text(line)
    if other is not None:
      raise UserError(
        f'--run={workdir}: did not read the text of trial {other["trial"]} in its tokens, and nats '
        'a token of the two cannot be compared; give a --workdir of its own'
      )
    for other in there:
      if other['digest'] == line['digest'] and other['trial'] != name:
        raise UserError(f'--run={workdir}: its weights stand there already, as {other["trial"]}')
    results.add(line)
  return line


def _targets(lines: Sequence[dict[str, Any]]) -> int | None:
  """On how many the sweep's trials are read; None if no line tells."""
  told = ({**line.get('settings', {}), **line['fields']} for line in lines)
  return next((int(of['data.eval_tokens']) for of in told if 'data.eval_tokens' in of), None)


def _weights(workdir: Path, step: int) -> str:
  """Which they are: two runs of one config may hold others."""
  sums = workdir / 'checkpoints' / str(step) / checksums.NAME
  return f'{step} {hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else ""}'
