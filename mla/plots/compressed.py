"""Models compressed after the fact, against learned ones: loss by cache bytes, a line a way."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.plots import labels, panels
from mla.plots.styles import GREY, LOOKS

# A colour and marker for each way, the same in every picture.
WAYS = {
  'learned from scratch': LOOKS[3],
  'svd': LOOKS[4],
  'whitened': LOOKS[1],
  'two_sided': LOOKS[2],
  'healed, 5 %': LOOKS[5],
  'healed, 20 %': LOOKS[6],
  'healed': LOOKS[6],
}
LOSS = 'validation loss, nats per token'


def compressed(
  figure: Figure,
  lines: Mapping[str, Sequence[Mapping[str, Any]]],
  flat: Mapping[str, float],
  title: str,
  remark: str = '',
  *,
  logarithmic: bool = False,
) -> None:
  """{way: points with bytes_per_token, loss, half_width or None} as lines over bytes (log scale).

  `flat` are losses that have no size, as dashed lines with their names in the legend.
  """
  axes = figure.subplots()
  sizes = [point['bytes_per_token'] for points in lines.values() for point in points]
  for way, points in lines.items():
    look = WAYS[way]
    points = sorted(points, key=lambda point: point['bytes_per_token'])
    axes.errorbar(
      [point['bytes_per_token'] for point in points],
      [point['loss'] for point in points],
      [point.get('half_width') or 0 for point in points],
      color=look[0], marker=look[1], linewidth=1.2, capsize=3, label=way,
    )  # fmt: skip
  for (name, height), style in zip(flat.items(), itertools.cycle(('--', ':', '-.')), strict=False):
    axes.axhline(height, color=GREY, linestyle=style, linewidth=1, label=name)
  labels.headline(figure, title, remark)
  panels.log_axis(axes, panels.log_limits(sizes))
  if logarithmic:
    _log_losses(axes)
  panels.axis_labels(figure, [axes], 'KV cache, bytes a token (log scale)', LOSS)
  axes.legend(frameon=False, fontsize='small')
  axes.spines[['top', 'right']].set_visible(False)
  labels.settle(figure)
  panels.log_ticks(axes, sizes, [])


def _log_losses(axes: Axes) -> None:
  axes.set_yscale('log', base=2)
  axes.yaxis.set_major_formatter('{x:g}')
