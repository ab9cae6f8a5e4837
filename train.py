"""Trains a model.

  python train.py --config=configs/mla_small.py [--workdir=DIR] [--config.FIELD=VALUE ...]

Run again with the same workdir, it goes on from the last checkpoint. With --dry_run nothing is
trained: the training step is compiled, for this machine or for --target's, and what it needs is
printed. Exit codes: 0 trained, 2 a mistake in what was given, 1 the loss diverged or the machine
failed, 143 stopped by SIGTERM and 130 by Ctrl-C, with everything saved.
"""

import json

from absl import flags

from mla import backends, cli, config, dry_run, files, paths, signals, targets
from mla.errors import UserError
from mla.train import train_and_evaluate

CONFIG = cli.define_config('--config=configs/mla_small.py')
WORKDIR = flags.DEFINE_string('workdir', None, 'where the run is kept; runs/CONFIG when not given')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'compile only, and say what the run needs')
ABOUT_DRY_RUNS = {
  'target': flags.DEFINE_string('target', None, f'compile for: {targets.EXAMPLES}'),
  'json': flags.DEFINE_string('json', None, 'write the figures here'),
  'fit_batch': flags.DEFINE_bool('fit_batch', None, 'find the most rows at once that fit'),
  'context': flags.DEFINE_integer('context', None, 'tokens a user of the trained model has'),
  'price': flags.DEFINE_float('price', None, 'dollars a device and hour: what the run costs'),
  'mfu': flags.DEFINE_float('mfu', None, 'with --price: the share of the peak reached; 0.4'),
}


def main() -> int:
  if CONFIG.value is None:
    raise UserError('--config: which? e.g. --config=configs/mla_small.py')
  config.validate(CONFIG.value)  # the next lines count on it
  if DRY_RUN.value:
    return only_compile()
  for name, flag in ABOUT_DRY_RUNS.items():
    if flag.value is not None:
      raise UserError(f'--{name}: goes with --dry_run; add that, or leave it out')
  given = f'runs/{cli.config_name()}' if WORKDIR.value is None else WORKDIR.value
  workdir = paths.folder('workdir', given)
  paths.check_workdir(workdir)
  prepare()
  ending = train_and_evaluate(CONFIG.value, workdir)
  if not ending:
    return signals.exit_code(ending.value)
  print(f'next: python eval.py --workdir={workdir}')
  return 0


def prepare() -> None:
  rows = CONFIG.value.batch_size // CONFIG.value.accumulation_steps
  backends.prepare(rows, mesh=CONFIG.value.mesh.to_dict())


def only_compile() -> int:
  asked = {name: flag.value for name, flag in ABOUT_DRY_RUNS.items() if flag.value is not None}
  json_file = paths.output('json', asked.pop('json', None), 'target')
  if targets.is_here(asked.get('target')):
    prepare()
  report = dry_run.answer(CONFIG.value, **asked)
  print(dry_run.card(report, CONFIG.value))
  if json_file:
    try:
      files.write_whole(json_file, json.dumps(report, indent=2) + '\n')
    except OSError as error:
      raise files.cannot(
        f'--json={json_file}: cannot be written', error, 'choose another'
      ) from error
  return 0


if __name__ == '__main__':
  cli.run(main)
