"""Runs a sweep: trials on an engine, their results on disk, nothing done twice.

DIR/trials/NAME/   a trial's workdir, as train.py leaves it; logs/NAME.txt what it printed
DIR/results.jsonl  a line a trial; windows.npz each trial's loss on every evaluation window
DIR/frontier.json, frontier.png, report.md
DIR/costs/         each arm's FLOPs and training memory; ray/ what Ray keeps; .lock the lease
"""

import contextlib
import io
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mla import cost, files, frontier, metrics
from mla.data.pipeline import load_data
from mla.errors import Diverged, MachineError, UserError, first_line
from mla.evaluate import score_run
from mla.signals import StopSignal
from mla.train import train_leased
from mla.trials import Trial, file_name
from mla.workdir import lease_workdir

CACHE_DTYPE = 'bfloat16'  # of the cache the trials are read through

Done = Callable[[Trial, dict[str, Any]], None]
Engine = Callable[[Sequence[Trial], Path, Done], None]
"""Runs each trial with run_trial(trial, folder) and calls done(trial, its line) as it ends."""


class Stopped(Exception):
  """A signal, SIGTERM or Ctrl-C, ended the sweep, with everything saved."""

  def __init__(self, by: int):
    super().__init__(by)
    self.by = by  # the signal's number


def local(trials: Sequence[Trial], folder: Path, done: Done) -> None:
  """The engine that runs one trial after another in this process."""
  stop = StopSignal()
  try:
    for trial in trials:
      line = run_trial(trial, folder)
      if line['status'] != 'stopped':
        done(trial, line)
      if stop.requested:
        raise Stopped(stop.requested)
  finally:
    stop.restore()


def run_sweep(
  trials: Sequence[Trial],
  folder: Path,
  engine: Engine,
  *,
  tune_on_first_seed: bool = False,
  say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Runs what results.jsonl lacks; returns the trials' lines, failed ones among them.

  With tune_on_first_seed, every learning rate runs with the first seed only, and each arm's best
  with the others. Raises UserError if another sweep runs in the folder, or if a result there is
  of another config; Stopped on SIGTERM or Ctrl-C.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--workdir={folder}: {error.strerror}; choose another folder') from error
  busy = f'--workdir={folder}: another sweep is at work there; wait for it'
  with files.lease(folder / '.lock', busy):
    results = Results(folder)
    results.check(trials)
    if tune_on_first_seed:
      stages = _two_stages(trials, results)
      arms, seeds = ({getattr(t, n) for t in trials} for n in ('arm', 'seed'))
      total = len(_first_seed(trials)) + len(arms) * (len(seeds) - 1)
    else:
      stages, total = iter([list(trials)]), len(trials)
    progress = Progress(total, say)

    def done(trial: Trial, line: dict[str, Any]) -> None:
      results.add(line)
      progress.ended(line)

    for stage in stages:
      missing = [trial for trial in stage if not results.has(trial)]
      progress.skipped(len(stage) - len(missing))
      if missing:
        engine(missing, folder, done)
    progress.close()
    return results.of(trials)


def _first_seed(trials: Sequence[Trial]) -> list[Trial]:
  return [trial for trial in trials if trial.seed == trials[0].seed]


def _two_stages(trials: Sequence[Trial], results: 'Results') -> Iterator[list[Trial]]:
  """Every learning rate with the first seed; then, of each arm, the best with the other seeds."""
  first = _first_seed(trials)
  yield first
  best = frontier.best_learning_rates(results.of(first))
  rest = [trial for trial in trials if trial.seed != trials[0].seed]
  yield [trial for trial in rest if best.get(trial.arm) == trial.learning_rate]


def run_trial(
  trial: Trial, folder: Path, train: Callable[[ConfigDict, Path], Any] = train_leased
) -> dict[str, Any]:
  """Trains a trial, or goes on with it, and reads it through its cache; returns its line.

  Waits while another process holds the lease of the trial's workdir, train.py among them. What goes
  wrong becomes status 'failed' with one line of error, so that it ends no other trial; SIGTERM and
  Ctrl-C give 'stopped'. `train` does the training, in this process unless the engine has others for
  it; it says something false if it was stopped.
  """
  workdir, log = folder / 'trials' / trial.name, log_of(folder / 'trials' / trial.name)
  for path in (workdir.parent, log.parent):
    path.mkdir(parents=True, exist_ok=True)
  line = _line(trial)
  began = time.monotonic()
  with (
    lease_workdir(workdir, wait=True),
    log.open('a') as out,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(out),
  ):
    try:
      print(f'process {os.getpid()} on {platform.node()}', flush=True)
      if not train(trial.config, workdir):
        return {**line, 'status': 'stopped'}
      figures, nll = score_run(workdir, CACHE_DTYPE, max_tokens=trial.config.data.eval_tokens)
      del figures['workdir'], figures['perplexity_ci95']  # the report's interval is over seeds
      return {
        **line,
        'status': 'done',
        'loss': float(nll.sum()) / figures['tokens_evaluated'],
        **figures,
        'tokens_per_second': _tokens_per_second(workdir),
        **_costs(trial, folder),
        'seconds': time.monotonic() - began,
        'window_nll': [float(value) for value in nll],
      }
    except (UserError, Diverged, MachineError) as error:
      return failed_line(trial, str(error))
    except Exception as error:
      traceback.print_exc()
      return failed_line(trial, f'{type(error).__name__}: {first_line(error)}; see {log}')


def log_of(workdir: Path) -> Path:
  """What a trial printed."""
  return workdir.parent.parent / 'logs' / f'{workdir.name}.txt'


def _line(trial: Trial) -> dict[str, Any]:
  return {
    'trial': trial.name,
    'arm': trial.arm,
    'seed': trial.seed,
    'learning_rate': trial.learning_rate,
    'fields': trial.fields,
    'digest': trial.digest,
    'arm_digest': trial.arm_digest,
    'settings': trial.settings,
  }


def failed_line(trial: Trial, error: str) -> dict[str, Any]:
  """The line of a trial that could not be finished, and why."""
  return {**_line(trial), 'status': 'failed', 'error': error}


def _tokens_per_second(workdir: Path) -> float:
  """Median of the logged rates; the first holds the start's."""
  lines = metrics.read(workdir / 'metrics.jsonl')
  rates = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
  return statistics.median(rates[1:] or rates)


def _costs(trial: Trial, folder: Path) -> dict[str, Any]:
  """cost.training_costs of the trial's arm, compiled once an arm and kept in DIR/costs."""
  path = folder / 'costs' / f'{file_name(trial.arm)}.json'
  path.parent.mkdir(exist_ok=True)
  if not path.exists():
    costs = cost.training_costs(trial.config, load_data(trial.config).tokenizer.vocab_size)
    files.write_whole(path, json.dumps(costs) + '\n')
  return json.loads(path.read_text())


class Results:
  """results.jsonl and windows.npz; written anew, whole, after every trial."""

  def __init__(self, folder: Path):
    self._path, self._windows_path = folder / 'results.jsonl', folder / 'windows.npz'
    lines = metrics.read(self._path, 'trial') if self._path.exists() else []
    self._lines = {line['trial']: line for line in lines}
    self._windows: dict[str, np.ndarray] = {}
    if self._windows_path.exists():
      with np.load(self._windows_path, allow_pickle=False) as stored:
        self._windows = dict(stored)

  def has(self, trial: Trial) -> bool:
    return self._lines.get(trial.name, {}).get('status') == 'done'

  def of(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [self._lines[trial.name] for trial in trials if trial.name in self._lines]

  def check(self, trials: Sequence[Trial]) -> None:
    arms = {line['arm']: line.get('arm_digest') for line in self._lines.values()}
    for trial in trials:
      if arms.get(trial.arm) not in (None, trial.arm_digest):
        raise UserError(
          f'trial {trial.name}: {self._path} holds trials of {trial.arm} with other settings; use '
          'another --workdir'
        )
      if self._lines.get(trial.name, {}).get('digest', trial.digest) != trial.digest:
        raise UserError(
          f'trial {trial.name}: {self._path} holds its result with other settings; use another '
          '--workdir'
        )

  def add(self, line: dict[str, Any]) -> None:
    windows = line.pop('window_nll', None)
    if windows is not None:
      self._windows[line['trial']] = np.asarray(windows, np.float32)
      arrays = io.BytesIO()
      np.savez_compressed(arrays, **self._windows)  # type: ignore[arg-type]
      files.write_whole(self._windows_path, arrays.getvalue())
    self._lines[line['trial']] = line
    text = ''.join(json.dumps(line) + '\n' for line in self._lines.values())
    files.write_whole(self._path, text)


class Progress:
  """A line for each trial that ends, with how many are left and for how long."""

  def __init__(self, total: int, say: Callable[[str], None]):
    self._total, self._say, self._done, self._ran = total, say, 0, 0
    self._began = time.monotonic()
    say(f'{total} trials')

  def skipped(self, count: int) -> None:
    self._done += count
    if count:
      self._say(f'{count} of {self._total} trials are done already')

  def ended(self, line: dict[str, Any]) -> None:
    self._done, self._ran = self._done + 1, self._ran + 1
    left = (self._total - self._done) * (time.monotonic() - self._began) / self._ran
    minutes, seconds = divmod(round(left), 60)
    clock = f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'
    result = f'loss {line["loss"]:.4f}' if line['status'] == 'done' else f'FAILED: {line["error"]}'
    self._say(f'[{self._done}/{self._total}] {line["trial"]}  {result}  {clock} left')

  def close(self) -> None:
    if not self._ran:
      self._say(f'all {self._done} trials were done already; nothing to train')
