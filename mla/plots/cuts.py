"""Latents cut after training: what bench.nested measured, loss against the bytes that are left."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mla.plots import labels, panels
from mla.plots.styles import GREY, PALE, Number, style

METHODS = {  # as bench/nested.py calls them: what they are, and how their lines look
  'as it lies': ('plain, cut', PALE, '--'),
  'turned': ('plain, turned to its axes and cut', GREY, '--'),
  'uniform': ('nested, one width', style('mla').colour, '-'),
  'by layer': ('nested, a width a layer', style('mha').colour, ':'),
}


def cuts(figure: Figure, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
  """Loss against cache bytes, a line a trial and method."""
  shown = [row for row in rows if row['method'] in methods]
  axes = figure.subplots()
  labels.headline(figure, _claim(shown), 'A line a trained run, read through a bfloat16 cache.')
  for trial in dict.fromkeys(row['trial'] for row in shown):
    for method in methods:
      of_trial = [row for row in shown if (row['trial'], row['method']) == (trial, method)]
      points = sorted((row['bytes_per_token'], row['loss']) for row in of_trial)
      if points:
        _, colour, line = METHODS[method]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker='.')
  sizes = [row['bytes_per_token'] for row in shown]
  panels.log_axis(axes, panels.log_limits(sizes))
  panels.axis_labels(figure, [axes], 'KV cache, bytes per token (log scale)')
  keys = []
  for method in methods:
    label, colour, line = METHODS[method]
    keys += axes.plot([], [], color=colour, linestyle=line, label=label)
  labels.legend(figure, keys, columns=2)
  labels.settle(figure)
  panels.log_ticks(axes, sizes, [max(sizes), min(sizes)])


def _claim(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the smallest cache of each method costs against its largest, on average over runs."""
  told = []
  for method in dict.fromkeys(row['method'] for row in rows):
    ends: list[tuple[Number, Number]] = []
    for trial in dict.fromkeys(row['trial'] for row in rows if row['method'] == method):
      of_trial = [row for row in rows if (row['trial'], row['method']) == (trial, method)]
      of_trial.sort(key=lambda row: row['bytes_per_token'])
      ends.append((of_trial[0]['loss'], of_trial[-1]['loss']))
    lost = float(np.mean([small - large for small, large in ends]))
    told.append(f'{METHODS[method][0]}: {lost:+.3f}')
  return f'From the largest cache to the smallest, in nats: {"; ".join(told)}'
