"""The input pipeline on one core: tokens/s of ours and of torch's DataLoader.

python -m bench.input_pipeline [--rounds=3] [--json=FILE]

Shuffled windows of the embedded corpus, in the small configs' batches. The second row sets our
pipeline, on one core, against our training step, on all: how much of a step it may cost.
"""

import os
import time

import numpy as np

from bench import harness

SECONDS = 3.0


def config_of():
  from bench.generation import small_config

  return small_config('mha')


def rate(batches, tokens: int) -> float:
  """Tokens a second of an endless iterator."""
  for _ in range(50):
    next(batches)
  began, count = time.perf_counter(), 0
  while time.perf_counter() - began < SECONDS:
    for _ in range(100):
      next(batches)
    count += 100
  return count * tokens / (time.perf_counter() - began)


def one_core() -> None:
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def ours(case: dict) -> dict:
  from mla.data.pipeline import load_data, train_batches

  config = config_of()
  stream = load_data(config).train
  one_core()
  batches = train_batches(stream, seq_len=config.seq_len, batch_size=config.batch_size, seed=0)
  tokens = config.batch_size * config.seq_len
  return {'grain': {'tokens_per_second': rate(batches, tokens)}}


def peer(case: dict) -> dict:
  import torch

  from mla.data.pipeline import TokenStream, load_data

  config = config_of()
  stream = load_data(config).train
  assert isinstance(stream, TokenStream)
  one_core()
  torch.set_num_threads(1)
  views = np.lib.stride_tricks.sliding_window_view(stream.tokens, config.seq_len + 1)
  windows = torch.from_numpy(views[:: config.seq_len].copy())
  loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(windows), batch_size=config.batch_size, shuffle=True
  )

  def endless():
    while True:
      yield from loader

  tokens = config.batch_size * config.seq_len
  return {'DataLoader': {'tokens_per_second': rate(endless(), tokens)}}


def main() -> None:
  args = harness.arguments({'ours': ours, 'peer': peer}, rounds=3)
  row = harness.side_by_side('bench.input_pipeline', {}, args.rounds, 'tokens_per_second')
  what = 'input pipeline, one core'
  rows = [{'variant': 'any', 'what': what, 'unit': 'tokens/s', **row}]
  case = {'variant': 'mha', 'batch': config_of().batch_size}
  step = harness.run_worker('bench.train_step', 'ours', case)['jit']['tokens_per_second']
  row = harness.one_ratio(row['ours'], step, 'our training step, all cores', row['ours'] / step)
  rows.append({'variant': 'mha', 'what': what, 'unit': 'tokens/s', **row})
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
