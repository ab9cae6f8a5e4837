"""Runs that the sweep did not train, as arms of its report: imported ones, compressed, healed.

report.py --run=W. Such a run is read as a trial is, through the same cache on as many targets of
its own data.*, and is an arm of one seed. How it came to be is its own: nothing of it is compared
but loss and bytes.
"""

import hashlib
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

  Its arm is called as the run's folder. The sweep's folder is made if need be. UserError if it has
  another arm of that name, or has read another text or other tokens, or is at work, or is none;
  Diverged if the run's loss is not finite.
  """
  config = read_config(workdir, 'run')
  trials.check_folder(folder)
  there = read_lines(folder / 'results.jsonl')
  name = trials.file_name(workdir.absolute().name)
  if any(name in (line['trial'], line['arm']) and not line.get(JOINED) for line in there):
    raise UserError(f'--run={workdir}: the sweep has an arm {name} of its own; rename the folder')
  told = {**there[0].get('settings', {}), **there[0]['fields']} if there else {}
  targets = int(told.get('data.eval_tokens', config.data.eval_tokens))
  scored = run.score(workdir, targets)
  learned = trials.learned(config, workdir)
  which = {**learned, 'weights': _weights(workdir)}
  line = {
    'trial': name,
    'arm': name,
    'seed': config.seed,
    'learning_rate': config.learning_rate,
    'fields': {},
    'digest': trials.hash_of(which),
    'arm_digest': trials.hash_of({**which, 'eval_tokens': targets}),
    # What decides what is read of it; the rest of its config is no setting of this sweep.
    'settings': {
      **{key: value for key, value in learned.items() if key.startswith('data.')},
      'data.eval_tokens': targets,
      'seq_len': config.seq_len,
    },
    **scored,
    'tokens_per_second': None,
    JOINED: True,
  }
  with run.lease_sweep(folder):
    results = Results(folder)
    other = results.other_text(line)
    if other is not None:
      raise UserError(
        f'--run={workdir}: did not read the text of trial {other["trial"]} in its tokens, and nats '
        'a token of the two cannot be compared; give a --workdir of its own'
      )
    results.add(line)
  return line


def _weights(workdir: Path) -> str:
  """Which they are, by the newest checkpoint: two runs of one config may hold others."""
  step = Checkpoints(workdir).steps()[-1]
  sums = workdir / 'checkpoints' / str(step) / checksums.NAME
  return f'{step} {hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else ""}'
