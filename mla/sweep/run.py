"""Runs a sweep: trials on an engine, their results on disk, nothing done twice.

DIR/trials/NAME/   a trial's workdir, as train.py leaves it; logs/NAME.txt what it printed
DIR/results.jsonl, windows.npz, costs/   what came out, see results.py
DIR/frontier.json, frontier.png, report.md, report.html; looks.json how often results were looked at
DIR/ray/, starts/  what the Ray engine keeps; .lock the lease
"""

import contextlib
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mla import cost, files, metrics
from mla.data.pipeline import load_data
from mla.errors import Diverged, MachineError, UserError, first_line
from mla.evaluate import score_widths
from mla.signals import StopSignal
from mla.sweep import tuning, widths
from mla.sweep.results import (
  Results,
  are_costs,
  costs_of,
  other_text,
  read_costs,
  told_apart,
  write_costs,
)
from mla.sweep.trials import Trial
from mla.sweep.watch import Watch
from mla.terminal import clock
from mla.train import train_leased
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

  With tune_on_first_seed, every learning rate runs with one seed only, the lowest, and each arm's
  best with the others. Raises UserError if another sweep runs in the folder, or if a result there
  is damaged or of another config; Stopped on SIGTERM or Ctrl-C.
  """
  with lease_sweep(folder):
    results = Results(folder)
    trials = results.settle(trials)
    results.rename_arms(trials)
    if tune_on_first_seed:
      first = _tuning_stage(trials, results)
      stages = _two_stages(first, trials, results)
      arms, seeds = ({getattr(t, n) for t in trials} for n in ('arm', 'seed'))
      total = len(first) + len(arms) * (len(seeds) - 1)
    else:
      stages, total = iter([list(trials)]), len(trials)
    watch = Watch(trials, folder, say)
    progress = Progress(total, watch.say, folder / 'logs')

    def done(trial: Trial, line: dict[str, Any]) -> None:
      other = results.other_text(line) if line['status'] == 'done' else None
      if other is not None:
        line = failed_line(trial, f'its text or tokenizer is not that of trial {other["trial"]}')
      results.add(line)
      watch.ended(trial)
      progress.ended(line)

    for stage in stages:
      left = [trial for trial in stage if not results.has(trial)]
      ended = results.of([trial for trial in stage if results.has(trial)])
      progress.stage(ended, len(results.of(left)), len(left))
      if left:
        with watch:
          engine(left, folder, done)
    progress.close()
    return results.of(trials)


@contextlib.contextmanager
def lease_sweep(folder: Path) -> Iterator[None]:
  """Keeps every other sweep out of the folder, which is made if need be; UserError if one is in."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    cure = 'choose another folder'
    raise files.cannot(f'--workdir={folder}: cannot be made', error, cure) from error
  busy = f'--workdir={folder}: another sweep is at work there; wait for it'
  with files.lease(folder / '.lock', busy):
    yield


def missing(trials: Sequence[Trial], folder: Path) -> list[Trial]:
  """Those that run_sweep has yet to run, by the names of their folders there.

  With tune_on_first_seed it may run fewer. Raises UserError as run_sweep does.
  """
  results = Results(folder)
  return [trial for trial in results.settle(trials) if not results.has(trial)]


def check_text(lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
  """UserError if lines of trials.check and what is in the folder are not of one text and tokens."""
  if not lines:
    return
  line = lines[0]  # with which all must agree
  other = other_text(line, lines) or Results(folder).other_text(line)
  if other is None:
    return
  unlike = told_apart(line, other)
  if unlike:
    raise UserError(
      f'{unlike}: trials {line["trial"]} and {other["trial"]} would not read the same text in '
      'the same tokens, and nats a token of the two cannot be compared; give each a sweep, and '
      'a --workdir, of its own'
    )
  raise UserError(
    f'trial {line["trial"]}: the text or the tokenizer is not what {folder} holds the result '
    f'of trial {other["trial"]} for; put that back, or use another --workdir'
  )


def _tuning_stage(trials: Sequence[Trial], results: Results) -> list[Trial]:
  """Those with each arm's tuning seed: the one that has tuned it here before, else the lowest."""
  lowest = min(trial.seed for trial in trials)
  rates = tuning.by_arm(results.of(trials))
  seeds = {arm: tuning.tuning_seed(of_arm) for arm, of_arm in rates.items()}
  return [trial for trial in trials if trial.seed == seeds.get(trial.arm, lowest)]


def _two_stages(
  first: Sequence[Trial], trials: Sequence[Trial], results: Results
) -> Iterator[list[Trial]]:
  """Every learning rate with the tuning seed; then, of each arm, the best with the other seeds."""
  yield list(first)
  best = {arm: tuning.judge(of).rate for arm, of in tuning.by_arm(results.of(trials)).items()}
  tuned = {trial.name for trial in first}
  rest = [trial for trial in trials if trial.name not in tuned]
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
  began, stop = time.monotonic(), StopSignal()
  try:
    with lease_workdir(workdir, waiting=lambda: not stop.requested), _printing_to(log):
      print(f'process {os.getpid()} on {platform.node()}', flush=True)
      if not train(trial.config, workdir):
        return {**trial.line, 'status': 'stopped'}
      return {
        **trial.line,
        **score(workdir, trial.config.data.eval_tokens),
        'tokens_per_second': _tokens_per_second(workdir),
        'seconds': time.monotonic() - began,
      }
  except Diverged as error:
    return failed_line(trial, str(error), diverged=True)
  except (UserError, MachineError) as error:
    if stop.requested:  # it waited for the lease until then, or fails again when it runs again
      return {**trial.line, 'status': 'stopped'}
    return failed_line(trial, str(error))
  except Exception as error:  # its traceback is in the log
    return failed_line(trial, f'{type(error).__name__}: {first_line(error)}; see {log}')
  finally:
    stop.restore()


def score(workdir: Path, max_tokens: int) -> dict[str, Any]:
  """What the line of a run that is trained tells of it, but for whose it is and its speed.

  Diverged if its loss is not finite; UserError as eval.py's.
  """
  scores = score_widths(workdir, CACHE_DTYPE, max_tokens=max_tokens)
  # The report's interval is over seeds, and which devices a trial met is no result.
  left_out = {
    *'workdir layer_dims perplexity_ci95 loss_by_position loss_by_bigram'.split(),
    *'kv_cache_bytes_per_token_per_device accuracy_ci95'.split(),
  }
  found = []
  for figures, nll in scores:
    loss = float(nll.sum()) / figures['tokens_evaluated']
    if not math.isfinite(loss):
      raise Diverged(f'read through a {CACHE_DTYPE} cache its loss is not finite')
    kept = {name: value for name, value in figures.items() if name not in left_out}
    found.append({'loss': loss, **kept, 'window_nll': [float(value) for value in nll]})
  whole, *prefixes = found
  line = {'status': 'done', **whole}
  if prefixes:
    told = (*widths.FIGURES, *widths.OF_SOME, 'window_nll')
    line['prefixes'] = [
      {name: prefix[name] for name in told if name in prefix} for prefix in prefixes
    ]
  return line


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
  """What is printed meanwhile goes to the end of a log, as does what nobody expected."""
  try:
    log.parent.mkdir(parents=True, exist_ok=True)
    out = files.append(log)
  except OSError as error:
    raise files.cannot(f'{log}: cannot be written', error, 'remove or permit it') from error
  with out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    try:
      yield
    except (UserError, MachineError, Diverged):
      raise
    except Exception:
      traceback.print_exc()
      raise


def log_of(workdir: Path) -> Path:
  """What a trial printed."""
  return workdir.parent.parent / 'logs' / f'{workdir.name}.txt'


def failed_line(trial: Trial, error: str, *, diverged: bool = False) -> dict[str, Any]:
  """The line of a trial that could not be finished, and why; who diverged is not tried again."""
  why = {'diverged': True} if diverged else {}
  return {**trial.line, 'status': 'failed', 'error': error, **why}


def _tokens_per_second(workdir: Path) -> float | None:
  """Median of the logged rates, of which the first holds the start's; None if none can be read."""
  try:
    lines = metrics.read(workdir / 'metrics.jsonl')
  except (OSError, UserError):  # the trial is done all the same
    return None
  rates: list[float] = [
    line['tokens_per_second']
    for line in lines
    if isinstance(line.get('tokens_per_second'), int | float)
  ]
  return statistics.median(rates[1:] or rates) if rates else None


def add_costs(
  trials: Sequence[Trial],
  lines: Sequence[Mapping[str, Any]],
  folder: Path,
  say: Callable[[str], None] = print,
) -> None:
  """Compiles what each arm of the lines costs, for the report; an arm that is known never again.

  What can't be compiled raises nothing: that is kept too, and the report says so. Raises Stopped on
  SIGTERM or Ctrl-C.
  """
  configs = {trial.arm_digest: trial.config for trial in trials}
  unknown = {
    line['arm_digest']: configs[line['arm_digest']]
    for line in lines
    if line['status'] == 'done'
    and costs_of(folder, line)['flops_per_token'] is None
    and read_costs(folder, line['arm_digest']) is None
  }
  if unknown:
    say(f'compiling what {len(unknown)} arms cost, once')
  stop = StopSignal()
  try:
    for arm, config in unknown.items():
      # Stays if the compiler ends the process, so that the next report is not ended by it as well.
      write_costs(folder, arm, {'error': 'its process ended while compiling'})
      write_costs(folder, arm, _compile_costs(config))
      if stop.requested:
        raise Stopped(stop.requested)
  finally:
    stop.restore()


def _compile_costs(config: ConfigDict) -> dict[str, Any]:
  """cost.training_costs, or {'error': why there are none}."""
  try:
    costs = cost.training_costs(config, load_data(config).tokenizer.vocab_size)
  except Exception as error:  # whatever XLA raises
    return {'error': f'{type(error).__name__}: {first_line(error)}'}
  return costs if are_costs(costs) else {'error': 'the compiler counts none here'}


class Progress:
  """How many trials there are, then a line for each that ends, with how long the rest will take."""

  def __init__(self, total: int, say: Callable[[str], None], logs: Path):
    self._total, self._say, self._logs = total, say, logs
    self._done = self._diverged = self._ran = 0
    self._told = False
    self._began = time.monotonic()

  def stage(self, ended: Sequence[Mapping[str, Any]], again: int, running: int) -> None:
    """What is known before `running` trials start, `again` of which failed before."""
    self._done += len(ended)
    self._diverged += sum(line['status'] == 'failed' for line in ended)
    if running and (ended or again or not self._told):
      head = f'{self._total} trials'
      if self._done:
        head = f'{self._done} of {self._total} trials are done already{self._final()}'
      self._say(head + (f'; {again} that failed before are tried again' if again else ''))
      self._say(f'what they print goes to {self._logs}')
      self._told = True

  def ended(self, line: Mapping[str, Any]) -> None:
    self._done, self._ran = self._done + 1, self._ran + 1
    left = (self._total - self._done) * (time.monotonic() - self._began) / self._ran
    result = f'loss {line["loss"]:.4f}' if line['status'] == 'done' else f'FAILED: {line["error"]}'
    self._say(f'[{self._done}/{self._total}] {line["trial"]}  {result}  {clock(left)} left')

  def close(self) -> None:
    if not self._told:
      self._say(f'all {self._done} trials were done already{self._final()}; nothing to train')

  def _final(self) -> str:
    """Of those that diverged, which would do so again: from a config the same loss comes."""
    if not self._diverged:
      return ''
    return (
      f' ({self._diverged} of them diverged, as they would again; to try, take their lines out of '
      'results.jsonl)'
    )
