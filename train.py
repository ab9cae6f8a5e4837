"""Trains a model.

  python train.py --config=configs/mla_small.py [--workdir=DIR] [--config.FIELD=VALUE ...]

Run again with the same workdir, it goes on from the last checkpoint. Exit codes: 0 trained, 2 a
mistake in what was given, 1 the loss diverged or the machine failed, 143 stopped by SIGTERM and 130
by Ctrl-C, with everything saved.
"""

from absl import flags

from mla import backends, cli, config, paths, signals
from mla.errors import UserError
from mla.train import train_and_evaluate

CONFIG = cli.define_config('--config=configs/mla_small.py')
WORKDIR = flags.DEFINE_string('workdir', None, 'where the run is kept; runs/CONFIG when not given')


def main() -> int:
  if CONFIG.value is None:
    raise UserError('--config: which? e.g. --config=configs/mla_small.py')
  config.validate(CONFIG.value)  # the next lines count on it
  given = f'runs/{cli.config_name()}' if WORKDIR.value is None else WORKDIR.value
  workdir = paths.folder('workdir', given)
  paths.check_workdir(workdir)
  rows = CONFIG.value.batch_size // CONFIG.value.accumulation_steps
  backends.prepare(rows, mesh=CONFIG.value.mesh.to_dict())
  ending = train_and_evaluate(CONFIG.value, workdir)
  if not ending:
    return signals.exit_code(ending.value)
  print(f'next: python eval.py --workdir={workdir}')
  return 0


if __name__ == '__main__':
  cli.run(main)
