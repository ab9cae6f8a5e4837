r"""Trains and compares many arms.

  python sweep.py --config=configs/mla_small.py --workdir=runs/latents \
    --sweep=latent_dim=16,32,64 --sweep=seed=0,1,2
  python sweep.py --config=configs/mha_small.py --workdir=runs/arms \
    --arms=configs/sweeps/frontier.py --sweep=learning_rate=0.002,0.004,0.008 \
    --sweep=seed=0,1,2 --tune_on_first_seed
  python sweep.py --config=configs/mla_small.py --workdir=runs/ray --sweep=seed=0,1 \
    --engine=ray --resources=cpu=4,gpu=1

With --dry_run [--target=v5e:2x4] [--price=DOLLARS] [--mfu=0.4] [--json=F] nothing is trained: each
distinct training step is compiled, for this machine or for --target's, and what it needs, and with
a price what all trials cost, is printed.

Each --sweep multiplies the trials; fields that move together are written
--sweep=attention,num_kv_heads=gqa:2,mqa:0. Run again, it does only what is missing. Exit codes: 0
all done, 1 some trial failed, 2 a mistake in what was given, 143 stopped by SIGTERM, 130 by Ctrl-C.
"""

# ruff: noqa: E402
import math
from collections.abc import Sequence

from absl import flags

from configs import base
from mla import cli

CONFIG = cli.define_config('--config=configs/mla_small.py', base)
SWEEP = flags.DEFINE_multi_string('sweep', [], 'FIELD=VALUE,VALUE,...; give it again for each axis')
ARMS = flags.DEFINE_string('arms', None, 'a file of named arms, e.g. configs/sweeps/frontier.py')
WORKDIR = flags.DEFINE_string('workdir', None, 'where trials and results are kept')
ENGINE = flags.DEFINE_enum('engine', 'local', ['local', 'ray'], 'what runs the trials')
ADDRESS = flags.DEFINE_string(
  'address', None, 'a running Ray cluster; one of its own when not given'
)
RESOURCES = flags.DEFINE_string(
  'resources',
  '',
  "what a trial holds with --engine=ray, e.g. cpu=4,gpu=1; all of a machine's cores",
)
SLICE = flags.DEFINE_string(
  'slice',
  None,
  'with --engine=ray: the TPU slice of several hosts that a trial trains on, e.g. TPU-V4:2x2x2; '
  '--resources=TPU=4 is then the chips of one host',
)
TUNE = flags.DEFINE_bool(
  'tune_on_first_seed', False, 'other seeds take the learning rate that was best with the first'
)
REFERENCE = flags.DEFINE_string('reference', '', 'the arm to compare with; the largest cache')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'compile only, and say what the trials need')
TARGET = flags.DEFINE_string('target', None, 'with --dry_run: v5e:2x4, h100 and the like')
JSON = flags.DEFINE_string('json', None, 'with --dry_run: write the figures here')
PRICE = flags.DEFINE_float('price', None, 'with --dry_run: dollars a device and hour, for the cost')
MFU = flags.DEFINE_float('mfu', None, 'with --price: share of the peak in useful FLOPs, 0.4')
MARGIN = flags.DEFINE_float(
  'margin', None, 'nats a token that the sweet spot may lose; 0.02 when not given'
)

if __name__ == '__main__':
  cli.begin(say='loading JAX')

from mla import backends, files, paths, signals, targets
from mla import config as config_lib
from mla.errors import UserError
from mla.sweep import dry_sweep, frontier, looks, page, ray_engine, report, trials
from mla.sweep import run as sweep


def main() -> int:
  if CONFIG.value is None:
    raise cli.which_config()
  if WORKDIR.value is None and not DRY_RUN.value:
    raise UserError('--workdir: where to? e.g. --workdir=runs/sweep')
  if not SWEEP.value and ARMS.value is None:
    raise UserError('--sweep: over what? e.g. --sweep=latent_dim=16,32 --sweep=seed=0,1,2')
  arms = trials.load_arms(ARMS.value) if ARMS.value is not None else {}
  todo = trials.expand(CONFIG.value, arms, [trials.parse_axis(axis) for axis in SWEEP.value])
  if DRY_RUN.value:
    return only_compile(todo)
  for flag in (TARGET, JSON, PRICE, MFU):
    if flag.present:
      raise UserError(f'--{flag.name}: goes with --dry_run; add that, or leave it out')
  folder = paths.folder('workdir', WORKDIR.value or '')
  paths.check_workdir(folder)
  names = {trial.arm for trial in todo}
  if REFERENCE.value and REFERENCE.value not in names:
    raise UserError(f'--reference={REFERENCE.value}: no such arm; choose one of {sorted(names)}')
  margin = frontier.MARGIN if MARGIN.value is None else MARGIN.value
  if not 0 <= margin < math.inf:
    raise UserError(f'--margin={margin}: must be 0 or positive, and finite')
  prepare(todo)
  engine = make_engine()
  looks.read(folder)  # if damaged, refused before hours of training
  missing = sweep.missing(todo, folder)
  lines = trials.check(missing, folder, on_these_devices=ENGINE.value == 'local')
  sweep.check_text(lines, folder)
  try:
    lines = sweep.run_sweep(todo, folder, engine, tune_on_first_seed=TUNE.value)
    sweep.add_costs(todo, lines, folder)
  except sweep.Stopped as stopped:
    print('stopped, what was saved is kept; run the same command again to go on')
    return signals.exit_code(stopped.by)
  done = {line['arm'] for line in lines if line['status'] == 'done'}
  if not done or (REFERENCE.value and REFERENCE.value not in done):
    print(f'no report: {REFERENCE.value or "every trial"} failed; see {folder / "logs"}')
    return cli.EXIT_FAILED
  print('\n' + report.write(folder, REFERENCE.value, margin))
  print(page.write(folder, config_lib.flatten(base.get_config())))
  return cli.EXIT_FAILED if any(line['status'] == 'failed' for line in lines) else 0


def only_compile(todo: Sequence[trials.Trial]) -> int:
  json_file = paths.output('json', JSON.value, 'target')
  if targets.is_here(TARGET.value):
    prepare(todo)
  report = dry_sweep.answer(todo, target=TARGET.value, price=PRICE.value, mfu=MFU.value)
  print('\n' + dry_sweep.card(report))
  if json_file:
    files.write_json(json_file, report)
  return 0


def prepare(todo: Sequence[trials.Trial]) -> None:
  rows = math.gcd(*(t.config.batch_size // t.config.accumulation_steps for t in todo))
  backends.prepare(rows, mesh=CONFIG.value.mesh.to_dict())


def make_engine() -> sweep.Engine:
  if ENGINE.value == 'local':
    for flag in (ADDRESS, RESOURCES, SLICE):
      if flag.value:
        raise UserError(f'--{flag.name}={flag.value}: is for --engine=ray')
    return sweep.local
  resources = {'cpu': float(backends.core_count())}
  if RESOURCES.value:
    try:
      pairs = (part.split('=') for part in RESOURCES.value.split(','))
      # Ray writes CPU and GPU where it tells what a cluster has, cpu and gpu where a trial asks.
      ours = {'CPU': 'cpu', 'GPU': 'gpu'}
      resources = {ours.get(name, name): float(amount) for name, amount in pairs}
    except ValueError as error:
      raise UserError(f'--resources={RESOURCES.value}: write NAME=NUMBER,NAME=NUMBER') from error
    if not all(amount > 0 for amount in resources.values()):
      raise UserError(f'--resources={RESOURCES.value}: each amount must be positive')
  if SLICE.value and not resources.get('TPU', 0) >= 1:
    raise UserError(f'--slice={SLICE.value}: how many chips has a host? e.g. --resources=TPU=4')
  slice_ = ray_engine.parse_slice(SLICE.value) if SLICE.value else None
  return ray_engine.make_engine(ADDRESS.value, resources, slice_)


if __name__ == '__main__':
  cli.run(main)
