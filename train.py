"""Trains a model.

  python train.py --config=configs/mla_small.py
  python train.py --config=configs/mla_small.py --workdir=runs/c16 --config.latent_dim=16
  python train.py --config=configs/mla_medium.py --dry_run --target=v5e:2x4

Run again with the same workdir, it goes on from the last checkpoint. --init_from=W starts a new
run with the weights of the run in W; data, schedule and optimiser are its own. With --dry_run
nothing is trained: the training step is compiled, for this machine or for --target's, and what it
needs is printed. Exit codes: 0 trained, 2 a mistake in what was given, 1 the loss diverged or the
machine failed, 143 stopped by SIGTERM and 130 by Ctrl-C, with everything saved.
"""

# ruff: noqa: E402

from absl import flags

from configs import base
from mla import cli

CONFIG = cli.define_config('--config=configs/mla_small.py', base)
WORKDIR = flags.DEFINE_string('workdir', None, 'where the run is kept; runs/CONFIG when not given')
INIT_FROM = flags.DEFINE_string('init_from', None, "start a new run with another's weights")
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'compile only, and say what the run needs')
TARGET = flags.DEFINE_string('target', None, 'with --dry_run: v5e:2x4, h100 and the like')
JSON = flags.DEFINE_string('json', None, 'with --dry_run: write the figures here')
FIT_BATCH = flags.DEFINE_bool('fit_batch', False, 'with --dry_run: the most rows at once that fit')
CONTEXT = flags.DEFINE_integer('context', None, "with --dry_run: a user's tokens, for their caches")
BATCH = flags.DEFINE_integer('batch', None, 'with --dry_run: users at once, for their caches')
PRICE = flags.DEFINE_float('price', None, 'with --dry_run: dollars a device and hour, for the cost')
MFU = flags.DEFINE_float('mfu', None, 'with --price: share of the peak in useful FLOPs, 0.4')
PROFILE = flags.DEFINE_integer('profile', None, 'steps to trace, for TensorBoard and xprof')
WANDB = flags.DEFINE_string('wandb', None, 'the Weights & Biases project to log to as well')
MULTIHOST = flags.DEFINE_bool('multihost', False, 'train as one of several processes, all alike')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'with --multihost: HOST:PORT of process 0')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'with --multihost: which of them this is')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'with --multihost: how many there are')

if __name__ == '__main__':
  cli.begin(say='loading JAX')

from mla import backends, config, dry_run, files, hosts, paths, signals, targets
from mla.errors import UserError
from mla.train import train_and_evaluate
from mla.workdir import read_config


def main() -> int:
  if CONFIG.value is None:
    raise cli.which_config()
  config.validate(CONFIG.value)  # the next lines count on it
  if DRY_RUN.value and (PROFILE.present or WANDB.present):
    raise UserError('--profile, --wandb: nothing is trained with --dry_run; leave it out')
  if PROFILE.value is not None and PROFILE.value < 1:
    raise UserError(f'--profile={PROFILE.value}: must be a positive number of steps')
  if WANDB.value == '':
    raise UserError('--wandb: which project? e.g. --wandb=mla')
  if DRY_RUN.value:
    return only_compile()
  for flag in (TARGET, JSON, FIT_BATCH, CONTEXT, BATCH, PRICE, MFU):
    if flag.present:
      raise UserError(f'--{flag.name}: goes with --dry_run; add that, or leave it out')
  for flag in (COORDINATOR, PROCESS_ID, NUM_PROCESSES):
    if flag.present and not MULTIHOST.value:
      raise UserError(f'--{flag.name}: goes with --multihost; add that, or leave it out')
  given = f'runs/{cli.config_name()}' if WORKDIR.value is None else WORKDIR.value
  workdir = paths.folder('workdir', given)
  paths.check_workdir(workdir)
  if MULTIHOST.value:
    hosts.join(COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value)
  source = None if INIT_FROM.value is None else paths.folder('init_from', INIT_FROM.value)
  if source is not None:
    read_config(source, 'init_from')  # refused before anything is made
  prepare()
  ending = train_and_evaluate(
    CONFIG.value,
    workdir,
    init_from=source,
    profile=PROFILE.value or 0,
    project=WANDB.value or '',
  )
  if not ending:
    return signals.exit_code(ending.value)
  if hosts.is_first():
    print(f'next: python eval.py --workdir={workdir}')
  return 0


def prepare() -> None:
  rows = CONFIG.value.batch_size // CONFIG.value.accumulation_steps
  backends.prepare(rows, mesh=CONFIG.value.mesh.to_dict())


def only_compile() -> int:
  json_file = paths.output('json', JSON.value, 'target')
  if targets.is_here(TARGET.value):
    prepare()
  report = dry_run.answer(
    CONFIG.value,
    target=TARGET.value,
    context=CONTEXT.value,
    batch=BATCH.value,
    fit_batch=FIT_BATCH.value,
    price=PRICE.value,
    mfu=MFU.value,
  )
  print(dry_run.card(report, CONFIG.value))
  if json_file:
    files.write_json(json_file, report)
  return 0


if __name__ == '__main__':
  cli.run(main)
