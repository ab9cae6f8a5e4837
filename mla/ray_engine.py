"""The Ray engine: a sweep's trials as Ray Tune trials, on this machine or on a running cluster.

Needs the extra [sweep]. The driver only schedules and writes results; JAX starts in the workers. A
trial whose worker or node dies is started again elsewhere and goes on from its checkpoint, so the
sweep's folder must be one that all nodes see.
"""

import functools
import importlib.util
import json
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla import cpu
from mla.errors import UserError
from mla.sweep import Done, Engine, Stopped, failed_line, run_trial
from mla.trials import Trial

RESTARTS = 5  # of one trial, before it counts as failed


def make_engine(address: str | None, resources: Mapping[str, int | float]) -> Engine:
  """An engine on the cluster at `address`, or on one of its own on this machine if None.

  `resources` is what a trial holds, by Ray's names: {'cpu': 2}, {'cpu': 4, 'gpu': 1}. On CPUs a
  trial computes on as many devices as it holds CPUs. Raises UserError where Ray is not installed.
  """
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # nothing is sent home
  os.environ.setdefault('RAY_CHDIR_TO_TRIAL_DIR', '0')  # a config's relative paths stay good
  if importlib.util.find_spec('ray') is None:
    raise UserError("--engine=ray: needs Ray; pip install -e '.[sweep]'")
  return functools.partial(_run, address=address, resources=dict(resources))


def _run(
  trials: Sequence[Trial],
  folder: Path,
  done: Done,
  *,
  address: str | None,
  resources: dict[str, int | float],
) -> None:
  import ray
  from ray import tune

  class Tell(tune.Callback):
    """Hands each trial's line on as it ends."""

    def on_trial_result(self, iteration, trials, trial, result, **_):
      ended.add(trial.config['index'])
      done(todo[trial.config['index']], json.loads(result['line']))

    def on_trial_error(self, iteration, trials, trial, **_):
      ended.add(trial.config['index'])
      of = todo[trial.config['index']]
      reason = f'its process died {RESTARTS + 1} times; see {folder}/logs/{of.name}.txt'
      done(of, failed_line(of, reason))

  todo, folder = list(trials), folder.absolute()
  ended: set[int] = set()
  started = not ray.is_initialized()
  if started:
    _connect(address)
  _check_room(resources, ray.cluster_resources(), may_grow=address is not None)
  rows = math.gcd(*(t.config.batch_size // t.config.accumulation_steps for t in todo))
  work = tune.with_parameters(
    _work, todo=todo, folder=folder, rows=rows, cores=max(1, int(resources.get('cpu', 1)))
  )
  try:
    tune.Tuner(
      tune.with_resources(work, resources),
      param_space={'index': tune.grid_search(list(range(len(todo))))},
      run_config=tune.RunConfig(
        name='tune',
        storage_path=str(folder / 'ray'),
        verbose=0,
        callbacks=[Tell()],
        failure_config=tune.FailureConfig(max_failures=RESTARTS),
      ),
    ).fit()
  finally:
    if started:
      ray.shutdown()
  if len(ended) < len(todo):  # Tune ends quietly on Ctrl-C
    raise Stopped


def _connect(address: str | None) -> None:
  import ray

  try:
    if address is None:
      # 'local', as None joins whatever cluster the environment, or one that died, points to
      ray.init(address='local', include_dashboard=False, log_to_driver=False)
    else:
      host, _, port = address.rpartition(':')
      if port.isdigit() and '://' not in address:  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=5).close()
      ray.init(address=address, log_to_driver=False)
  except (OSError, ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0][:200]
    raise UserError(f'--address={address}: no Ray cluster answers there ({reason})') from error


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


def _work(point: dict, *, todo: list[Trial], folder: Path, rows: int, cores: int) -> None:
  """One trial, in a worker process."""
  from ray import tune

  from mla import cli

  cpu.use_cores(rows, cores)
  cpu.keep_freed_memory()
  cli.use_compilation_cache()
  tune.report({'line': json.dumps(run_trial(todo[point['index']], folder))})
