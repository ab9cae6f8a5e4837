"""The Ray engine: a sweep's trials as Ray Tune trials, on this machine or on a running cluster.

Needs the extra [sweep]. The driver only schedules and writes results; JAX starts in the workers. A
trial whose worker or node dies is started again elsewhere and goes on from its checkpoint, so the
sweep's folder must be one that all nodes see.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import platform
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mla import backends, files
from mla.errors import Diverged, MachineError, UserError, first_line
from mla.sweep import restarts
from mla.sweep.run import Done, Engine, Stopped, failed_line, log_of, run_trial
from mla.sweep.trials import Trial
from mla.train import train_leased
from mla.workdir import claim_workdir

RESTARTS = 5  # of a trial whose process ends by itself and gets no further, before it has failed
# For whatever reason; so that a worker that can't even begin is not started for ever.
ALL_RESTARTS = 100

# A worker trains on a thread that is not its first. glibc gives such a thread an arena of its own,
# which maps and unmaps blocks above 64 MB each time, whatever cpu/host.py says by then.
RUNTIME_ENV = {'env_vars': {'MALLOC_ARENA_MAX': '1'}}


class Slice(NamedTuple):
  """A TPU slice of several hosts, by Ray's names."""

  accelerator: str  # 'TPU-V4'
  topology: str  # '2x2x2', in chips


def parse_slice(text: str) -> Slice:
  """'TPU-V4:2x2x2'; UserError if it is none."""
  found = re.fullmatch(r'(TPU-\w+):(\d+(?:x\d+)+)', text)
  if not found:
    raise UserError(f'--slice={text}: write ACCELERATOR:TOPOLOGY, e.g. TPU-V4:2x2x2')
  return Slice(*found.groups())


def make_engine(
  address: str | None, resources: Mapping[str, int | float], slice_: Slice | None = None
) -> Engine:
  """An engine on the cluster at `address`, or on one of its own on this machine if None.

  `resources` is what a trial holds, by Ray's names: {'cpu': 2}, {'cpu': 4, 'gpu': 1}. A
  trial that holds only CPUs computes with as many threads. With a slice, a trial trains on all
  hosts of one, as one program, and `resources` is what it holds of each, {'TPU': 4}; it is then
  read through its cache on one host's CPUs. Raises UserError where Ray is not installed.
  """
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # nothing is sent home
  os.environ.setdefault('RAY_CHDIR_TO_TRIAL_DIR', '0')  # a config's relative paths stay good
  if importlib.util.find_spec('ray') is None:
    raise UserError("--engine=ray: needs Ray; pip install -e '.[sweep]'")
  return functools.partial(_run, address=address, resources=dict(resources), slice_=slice_)


def _run(
  trials: Sequence[Trial],
  folder: Path,
  done: Done,
  *,
  address: str | None,
  resources: dict[str, int | float],
  slice_: Slice | None,
) -> None:
  import ray
  from ray import tune

  class Tell(tune.Callback):
    """Hands each trial's line on as it ends."""

    def __reduce__(self):
      # Tune writes its callbacks to disk, for a restoring that we have no use for; what these lead
      # to, a terminal and a thread that watches trials, cannot be written.
      return tune.Callback, ()

    def on_trial_result(self, iteration, trials, trial, result, **_):
      ended.add(trial.config['index'])
      done(todo[trial.config['index']], json.loads(result['line']))

    def on_trial_error(self, iteration, trials, trial, **_):
      ended.add(trial.config['index'])
      failed = todo[trial.config['index']]
      done(failed, _crashed_line(failed, folder, trial.num_failures))

  stopped_by = signal.SIGINT  # if by any

  def stop(*signal_and_frame) -> None:
    nonlocal stopped_by
    stopped_by = signal.SIGTERM
    signal.raise_signal(signal.SIGINT)  # on which Tune ends quietly

  todo, folder = list(trials), folder.absolute()
  ended: set[int] = set()
  started = not ray.is_initialized()
  if started:
    _connect(address)
  # After Ray's own handler, which ends the process with a code that says nothing.
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, stop)
  _check_room(resources, ray.cluster_resources(), may_grow=address is not None)
  rows = math.gcd(*(t.config.batch_size // t.config.accumulation_steps for t in todo))
  common = {'todo': todo, 'folder': folder, 'sweep': secrets.token_hex(8)}
  if slice_ is None:
    cores = max(1, int(resources.get('cpu', 1)))
    work = tune.with_parameters(_work, rows=rows, cores=cores, **common)
    held, at_once = resources, None  # as many as there is room for
  else:
    work = tune.with_parameters(_work_on_slice, slice_=slice_, resources=resources, **common)
    held, at_once = {'cpu': 1}, _count_slices(ray.cluster_resources())  # it waits for the hosts
  try:
    tune.Tuner(
      tune.with_resources(work, held),
      tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
      param_space={'index': tune.grid_search(list(range(len(todo))))},
      run_config=tune.RunConfig(
        name='tune',
        storage_path=str(folder / 'ray'),
        verbose=0,
        callbacks=[Tell()],
        failure_config=tune.FailureConfig(max_failures=ALL_RESTARTS),
      ),
    ).fit()
  finally:
    if started:
      ray.shutdown()
  if len(ended) < len(todo):
    raise Stopped(stopped_by)


def _connect(address: str | None) -> None:
  import ray

  try:
    if address is None:
      # 'local', as None joins whatever cluster the environment, or one that died, points to
      ray.init(
        address='local', include_dashboard=False, log_to_driver=False, runtime_env=RUNTIME_ENV
      )
    else:
      host, _, port = address.rpartition(':')
      if port.isdigit() and '://' not in address:  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=5).close()
      ray.init(address=address, log_to_driver=False, runtime_env=RUNTIME_ENV)
  except (OSError, ValueError, RuntimeError) as error:
    where = f'--address={address}: no Ray cluster answers there'
    if address is None:
      where = "--engine=ray: Ray's own cluster does not start"
    raise UserError(f'{where} ({first_line(error)})') from error


def _check_room(
  resources: Mapping[str, int | float], available: Mapping[str, int | float], *, may_grow: bool
) -> None:
  """Raises UserError if the whole cluster lacks what one trial asks; Tune would wait for ever.

  Only a warning where it may grow: an autoscaling cluster starts machines when they are asked for.
  """
  for name, amount in resources.items():
    there = available.get({'cpu': 'CPU', 'gpu': 'GPU'}.get(name, name), 0)
    if amount > there and may_grow:
      logging.warning(
        '--resources=%s=%g: the cluster has %g; waiting for more', name, amount, there
      )
    elif amount > there:
      raise UserError(f'--resources={name}={amount:g}: the cluster has {there:g}; ask for less')


def _count_slices(available: Mapping[str, int | float]) -> int:
  """Slices there are, by the mark that Ray gives the first host of each; at least 1."""
  marks = (n for name, n in available.items() if re.fullmatch('TPU-.*-head', name))
  return max(1, int(sum(marks)))


def _crashed_line(trial: Trial, folder: Path, times: int) -> dict:
  logs = f'{folder}/logs/{trial.name}.txt and {folder}/ray'
  return failed_line(trial, f'its process ended {times} times; see {logs}')


def _run_here(
  trial: Trial,
  folder: Path,
  sweep: str,
  train: Callable[[ConfigDict, Path], Any] = train_leased,
) -> None:
  """Reports a trial's line: that it failed, once too many of its processes ended."""
  import ray
  from ray import tune

  counting = restarts.counting(
    folder / 'starts' / f'{trial.name}.json',
    sweep=sweep,
    step=restarts.newest_step(folder / 'trials' / trial.name),
    node=ray.get_runtime_context().get_node_id(),
    alive={node['NodeID'] for node in ray.nodes() if node['Alive']},
  )
  with counting as crashes:
    if crashes > RESTARTS:
      line = _crashed_line(trial, folder, crashes)
    else:
      line = run_trial(trial, folder, train)
  tune.report({'line': json.dumps(line)})


def _work(
  point: dict, *, todo: list[Trial], folder: Path, sweep: str, rows: int, cores: int
) -> None:
  """One trial, in a worker process."""
  from mla import cli

  trial = todo[point['index']]
  backends.prepare(rows, cores=cores, mesh=trial.config.mesh.to_dict())
  cli.log_plainly()
  cli.use_compilation_cache()
  _run_here(trial, folder, sweep)


def _work_on_slice(
  point: dict,
  *,
  todo: list[Trial],
  folder: Path,
  sweep: str,
  slice_: Slice,
  resources: dict[str, int | float],
) -> None:
  """One trial, from a process beside the slice's hosts."""
  import jax

  from mla import cli

  jax.config.update('jax_platforms', 'cpu')  # the chips are the hosts'
  cli.log_plainly()
  cli.use_compilation_cache()
  train = functools.partial(_train_on_slice, slice_=slice_, resources=resources)
  _run_here(todo[point['index']], folder, sweep, train)


def _train_on_slice(
  config: ConfigDict, workdir: Path, *, slice_: Slice, resources: dict[str, int | float]
) -> bool:
  """Trains as one program over a slice's hosts; if one is lost, again on a slice."""
  from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
  from ray.train.v2.api.exceptions import TrainingFailedError
  from ray.train.v2.jax import JaxTrainer

  claim_workdir(config, workdir)
  chips = math.prod(map(int, slice_.topology.split('x')))
  while True:
    began_at = restarts.newest_step(workdir)
    try:
      result = JaxTrainer(
        _train_on_host,
        train_loop_config={'config': config, 'workdir': workdir},
        scaling_config=ScalingConfig(
          use_tpu=True,
          num_workers=int(chips // resources['TPU']),
          topology=slice_.topology,
          accelerator_type=slice_.accelerator,
          resources_per_worker=resources,
        ),
        run_config=RunConfig(
          name=workdir.name,
          storage_path=str(workdir.parent.parent / 'ray'),
          failure_config=FailureConfig(max_failures=RESTARTS),
          worker_runtime_env={'env_vars': {'RAY_TRAIN_ENABLE_PRINT_PATCH': '0'}},  # no line twice
        ),
      ).fit()
      break
    except TrainingFailedError:
      if restarts.newest_step(workdir) <= began_at:
        raise
  # Of the first host; in Ray's second API only.
  failed = getattr(result, 'return_value', None)
  if failed:
    diverged, error = failed
    raise (Diverged if diverged else UserError)(error)
  return True


def _train_on_host(what: dict) -> tuple[bool, str] | None:
  """A host's part; Ray has joined the hosts to one jax.distributed program.

  Returns what another try would end in as well: whether the run diverged, and the error.
  """
  from mla import cli

  cli.log_plainly()
  cli.use_compilation_cache()
  log = log_of(what['workdir'])
  with files.append(log) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    print(f'process {os.getpid()} on {platform.node()}', flush=True)
    try:
      train_leased(what['config'], what['workdir'])  # run_trial, elsewhere, holds the lease
    except (UserError, Diverged, MachineError) as failed:  # another try would end the same
      return isinstance(failed, Diverged), str(failed)
  return None
