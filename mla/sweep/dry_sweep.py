"""What a sweep needs on a named machine: the training step of its trials compiled, and nothing run.

Trials that differ only in fields of SAME_STEP run one compiled step; it is compiled once.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from mla import config as config_lib
from mla import dry_run, tables, terminal
from mla.errors import UserError
from mla.sweep.trials import Trial

# Neither what a step computes with nor what it keeps, but for constants in it.
SAME_STEP = {
  *'seed num_steps learning_rate warmup_steps weight_decay grad_clip embedding_std'.split(),
  *'eval_every checkpoint_every checkpoints_kept log_every'.split(),
}


def answer(
  trials: Sequence[Trial],
  *,
  target: str | None = None,
  price: float | None = None,
  mfu: float | None = None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """What sweep.py --dry_run writes as JSON, for its flags; must come before JAX's first use.

  Hours and dollars, given a price, are those of all trials one after another on the whole target.
  UserError, naming the trial, for one that cannot be compiled for it.
  """
  for trial in trials:
    config_lib.validate(trial.config)
  found = dry_run.find(target, price, mfu)
  reports: dict[str, dict[str, Any]] = {}
  for trial in trials:
    key = _step(trial)
    if key not in reports:
      try:
        report = dry_run.measure(trial.config, found, context=trial.config.seq_len)
      except UserError as error:
        raise UserError(f'trial {trial.name}: {error}') from error
      reports[key] = {**report, 'arms': [], 'trials': 0}
      say(f'{trial.arm}: compiled in {report["compile_seconds"]:.0f} s')
    report = reports[key]
    report['trials'] += 1
    if trial.arm not in report['arms']:
      report['arms'].append(trial.arm)
    if price is not None:
      share = dry_run.MFU if mfu is None else mfu
      counted = {**report, 'num_steps': trial.config.num_steps}
      run = dry_run.run_costs(counted, found, price, share)
      for what in ('hours', 'dollars'):
        report[what] = report.get(what, 0.0) + run[what]
  steps = list(reports.values())
  total: dict[str, Any] = {
    'target': found.name,
    'devices': len(found.devices),
    'trials': len(trials),
    'fits': all(step['fits'] for step in steps),
  }
  if price is not None:
    total |= {what: sum(step[what] for step in steps) for what in ('hours', 'dollars')}
    total['mfu'] = dry_run.MFU if mfu is None else mfu
  return {**total, 'steps': steps}


def card(report: dict[str, Any]) -> str:
  """The report for the terminal: a line for each step that is compiled, and their sum."""
  priced = 'hours' in report
  heads = ['arms', 'trials', 'fits', 'temporaries', 's a step, at least']
  rows = []
  for step in report['steps']:
    seconds, temporary = step['step_seconds_at_least'], step['temporary_bytes_per_device']
    cells = [
      ' '.join(step['arms']),
      f'{step["trials"]:,}',
      'yes' if step['fits'] else 'NO',
      '-' if temporary is None else f'{temporary / tables.GIB:.2f} GiB',
      '-' if seconds is None else f'{seconds:.3g}',
    ]
    rows.append(cells + ([f'{step["hours"]:,.1f}', f'{step["dollars"]:,.2f}'] if priced else []))
  fits = 'yes' if report['fits'] else 'NO'
  last = ['all', f'{report["trials"]:,}', fits, '', '']
  if priced:
    heads += ['hours', 'dollars']
    last += [f'{report["hours"]:,.1f}', f'{report["dollars"]:,.2f}']
    note = f', at {report["mfu"]:.0%} of the peak, one trial after another'
  machine = f'{report["target"]}: {report["devices"]} devices{note if priced else ""}'
  table = tables.columns([heads, *rows, last], words={0, 2}, width=terminal.width())
  return f'{machine}\n\n{table}'


def _step(trial: Trial) -> str:
  fields = config_lib.flatten(trial.config)
  kept = {
    name: value
    for name, value in fields.items()
    if name not in SAME_STEP and (name == 'data.tokenizer' or not name.startswith('data.'))
  }
  return json.dumps(kept, sort_keys=True)
