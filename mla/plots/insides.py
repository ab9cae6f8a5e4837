"""What lies in a cache and how it is read: spectra, attention maps, losses by position, dtypes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mla.plots import labels, panels
from mla.plots.costs import ENTRIES
from mla.plots.panels import Point
from mla.plots.styles import GREY, SMALL, Number, share, style, styles

NEAR = 8  # tokens: what counts as near in the attention maps' title


def spectra(figure: Figure, shares: np.ndarray, ranks: Sequence[Number]) -> None:
  """Shares of the latent's variance [L, C] along its principal axes, by layer; effective ranks."""
  layers, width = shares.shape
  told = dict.fromkeys(f'{rank:.0f}' for rank in (min(ranks), max(ranks)))
  axes = figure.subplots()
  labels.headline(
    figure,
    f"The latent's {width} dims are used like {' to '.join(told)} equal ones",
    'Effective rank: exp of the entropy of the shares. A straight line across would be all equal.',
  )
  floor = 1e-6
  for layer in range(layers):
    depth = 0.25 + 0.75 * layer / max(layers - 1, 1)
    axes.semilogy(
      np.arange(1, width + 1), np.maximum(shares[layer], floor),
      color=style('mla').colour, alpha=depth, linewidth=1.6,
      label=f'layer {layer + 1}: {ranks[layer]:.1f}',
    )  # fmt: skip
  axes.axhline(1 / width, color=GREY, linestyle='--', linewidth=1, label='all equal')
  axes.set(xlabel='principal axis', ylabel='share of the variance (log scale)')
  axes.grid(alpha=0.3)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  labels.legend(figure, axes.get_lines(), columns=5)
  labels.settle(figure)


def attention_maps(figure: Figure, maps: np.ndarray) -> None:
  """Attention [L, H, T, T] of each layer and head, darker for more; rows read, columns are read."""
  layers, heads, length, _ = maps.shape
  near = np.tril(np.ones((length, length)), 0) - np.tril(np.ones((length, length)), -NEAR)
  parts = 100 * (maps * near).sum(-1)[..., NEAR:].mean(-1)
  rows = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
  figure.suptitle(
    labels.wrapped(
      figure,
      f'Of a head\'s attention {parts.min():.0f} to {parts.max():.0f} % falls on the last {NEAR} '
      'tokens',
      0.95 * figure.bbox.width, labels.TITLE, 'bold',
    ),
    x=0.012, ha='left', fontsize=labels.TITLE, fontweight='bold',
  )  # fmt: skip
  for layer in range(layers):
    for head in range(heads):
      axes = rows[layer, head]
      axes.imshow(maps[layer, head], cmap='Greys', norm=PowerNorm(0.4, 0, 1), aspect='equal')
      axes.set(xticks=[], yticks=[])
      axes.set_title(f'{parts[layer, head]:.0f} %', fontsize=SMALL, pad=2)
      if layer == layers - 1:
        axes.set_xlabel(f'head {head + 1}', fontsize=SMALL)
      if head == 0:
        axes.set_ylabel(f'layer {layer + 1}', fontsize=SMALL)
  labels.settle(figure)


def by_position(figure: Figure, groups: Sequence[Mapping[str, Any]]) -> None:
  """breakdown.loss_by_position's groups: mean loss against how many tokens a target sees."""
  whole = [group for group in groups if group['to'] == 2 * group['from'] - 1]
  groups = whole if len(whole) > 1 else groups  # of the last doubling often a single position
  seen = [group['from'] for group in groups]
  heights = [group['loss'] for group in groups]
  axes = figure.subplots()
  labels.headline(
    figure,
    f'From {seen[0]} token{"s"[: seen[0] - 1]} seen to {seen[-1]} and more the loss falls by '
    f'{heights[0] - heights[-1]:.2f} nats, by {heights[-2] - heights[-1]:.3f} in the last doubling',
    'One point a doubling of what a target sees of its window.',
  )
  axes.plot(seen, heights, marker=style('mla').marker, color=style('mla').colour)
  axes.set_xscale('log', base=2)
  axes.minorticks_off()
  axes.set(xlabel='tokens seen, at least (log scale)', ylabel='loss, nats per token')
  axes.grid(alpha=0.3)
  labels.settle(figure)
  labels.ticks(axes, seen, [f'{count:,}' for count in seen], [])


def int8_parts(figure: Figure, costs: Mapping[str, tuple[float, float]]) -> None:
  """inside.cost_of_int8: how much loss each part costs when it is kept in int8."""
  told = [' and '.join(ENTRIES.get(name, name) for name in part.split(' and ')) for part in costs]
  axes = figure.subplots()
  most = max(mean + error for mean, error in costs.values())
  shown = [text for text, (mean, error) in zip(told, costs.values(), strict=True) if mean > error]
  labels.headline(
    figure,
    f'int8 is shown to cost something in: {", ".join(shown)}'
    if shown
    else f'What int8 costs cannot be told from nothing: {most:.0e} nats at most',
    'Loss above that through a float32 cache, same windows. Bars: two-sided 95 % over windows.',
  )
  for row, (mean, error) in enumerate(costs.values()):
    axes.errorbar(
      [mean], [row], xerr=[error], fmt=style('mla').marker, color=style('mla').colour, capsize=4
    )
  axes.axvline(0, color=GREY, linewidth=1)
  axes.set_yticks(range(len(told)), told)
  axes.set_ylim(len(told) - 0.5, -0.5)
  axes.spines[['top', 'right']].set_visible(False)
  axes.ticklabel_format(axis='x', style='sci', scilimits=(0, 0), useMathText=True)
  axes.xaxis.set_major_locator(MaxNLocator(6))
  axes.set_xlabel('nats per token')
  labels.settle(figure)


def dtypes(figure: Figure, runs: Sequence[Mapping[str, Any]]) -> None:
  """eval.py's runs through several caches: what a smaller dtype costs each against its float32."""
  whole = {run['workdir']: run for run in runs if run['cache_dtype'] == 'float32'}
  runs = [run for run in runs if run['workdir'] in whole]
  more = [100 * (run['perplexity'] / whole[run['workdir']]['perplexity'] - 1) for run in runs]
  sizes = [run['kv_cache_bytes_per_token'] for run in runs]
  points = [Point(value, value, value, ()) for value in more]
  limits = panels.log_limits(sizes)
  places = panels.side_by_side(sizes, limits)
  rows = panels.make(figure, points, (min(more), max(more)))  # one scale for all: no break
  least = min(runs, key=lambda run: run['kv_cache_bytes_per_token'])
  part = share(
    least['kv_cache_bytes_per_token'], whole[least['workdir']]['kv_cache_bytes_per_token']
  )
  worst = max(
    value
    for value, run in zip(more, runs, strict=True)
    if run['cache_dtype'] == least['cache_dtype']
  )
  labels.headline(
    figure,
    f'{least["cache_dtype"]} keeps {part} of the bytes of float32 and costs {worst:.3f} % of '
    'perplexity at most',
    'Each against itself through a float32 cache. One run each, and the same text.',
  )
  family = styles(run['attention'] for run in runs)
  lines = []
  for workdir in whole:
    mine = [i for i, run in enumerate(runs) if run['workdir'] == workdir]
    line = sorted((places[i], points[i].middle) for i in mine)
    lines.append(line)
    colour = family[whole[workdir]['attention']].colour
    for axes in rows:
      axes.plot(*zip(*line, strict=True), color=colour, linewidth=1, alpha=0.5, zorder=1)
  for run, x, point in zip(runs, places, points, strict=True):
    panels.draw(rows, x, point, family[run['attention']])
  for axes in rows:
    panels.log_axis(axes, limits)
  panels.axis_labels(figure, rows, 'KV cache, bytes per token (log scale)', 'perplexity, % more')
  labels.legend(figure, [panels.key(look) for look in family.values()], columns=6)
  labels.settle(figure)
  panels.log_ticks(rows[-1], sizes, [max(sizes), min(sizes)])
  told = [run['cache_dtype'] for run in runs]
  panels.name(rows, points, places, told, [family[r['attention']].colour for r in runs], lines)
