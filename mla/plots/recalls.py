"""What a probe says of caches (mla/probes.py): accuracy against the bytes they keep."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from mla.plots import labels, panels
from mla.plots.styles import PALE, styles


def recall(figure: Figure, summaries: Sequence[Mapping[str, Any]], title: str) -> None:
  """A panel a sweep: each arm's mean accuracy with 95 % over seeds; a line through each knob.

  The dotted line is what guessing gets.
  """
  panes = list(figure.subplots(1, len(summaries), sharey=True, squeeze=False)[0])
  labels.headline(figure, title)
  family = styles(arm['attention'] for summary in summaries for arm in summary['arms'])
  shown = [[arm['kv_cache_bytes_per_token'] for arm in s['arms']] for s in summaries]
  limits = panels.log_limits([size for sizes in shown for size in sizes])
  for axes, summary, sizes in zip(panes, summaries, shown, strict=True):
    probe = summary['probe']
    axes.set_title(
      f'{probe["task"]}, {probe["bits_held"] / probe["records"]:.3g} bits a record',
      loc='left',
      fontsize='medium',
    )
    places = {}
    for arm, x in zip(summary['arms'], panels.side_by_side(sizes, limits), strict=True):
      look, found = family[arm['attention']], arm['recall']
      axes.errorbar(
        [x], [found['mean_accuracy']], yerr=[found['half_width'] or 0], color=look.colour,
        marker=look.marker, capsize=2.5, linewidth=1.2,
      )  # fmt: skip
      places[arm['arm']] = (x, found['mean_accuracy'])
    for knob in summary['knobs']:
      line = sorted(places[name] for name in knob)
      axes.plot(*zip(*line, strict=True), color=PALE, linewidth=1.2, zorder=1)
    axes.axhline(probe['guessing'], color=PALE, linestyle=':')
    axes.set_ylim(-0.03, 1.06)
    panels.log_axis(axes, limits)
    axes.set_xlabel('KV cache, bytes per token')
  panes[0].set_ylabel('share of answers that are right')
  keys: list[Artist] = [panels.key(look) for look in family.values()]
  labels.legend(figure, keys, columns=len(keys))
  labels.settle(figure)
  for axes, sizes in zip(panes, shown, strict=True):
    panels.log_ticks(axes, sizes, [min(sizes), max(sizes)])


def caches(figure: Figure, panes: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
  """{probe: rows of recall.through}, a panel each: every arm through its two caches.

  Full where the cache is the usual one, hollow where it is the other.
  """
  every = list(figure.subplots(1, len(panes), sharey=True, squeeze=False)[0])
  labels.headline(figure, title)
  family = styles(row['attention'] for rows in panes.values() for row in rows)
  shown = [[size for row in rows for size in row['bytes'].values()] for rows in panes.values()]
  limits = panels.log_limits([size for sizes in shown for size in sizes])
  usual, cache = next(iter(panes.values()))[0]['bytes']
  for axes, (probe, rows) in zip(every, panes.items(), strict=True):
    axes.set_title(probe, loc='left', fontsize='medium')
    for row in rows:
      look = family[row['attention']]
      (x, other_x), (y, other_y) = (
        [row[what][name] for name in (usual, cache)] for what in ('bytes', 'accuracy')
      )
      axes.plot([x, other_x], [y, other_y], color=look.colour, linewidth=1)
      axes.plot([x], [y], color=look.colour, marker=look.marker)
      axes.plot(
        [other_x], [other_y], color=look.colour, marker=look.marker, markerfacecolor='white'
      )
    axes.set_ylim(-0.03, 1.06)
    panels.log_axis(axes, limits)
    axes.set_xlabel('KV cache, bytes per token')
  every[0].set_ylabel('share of answers that are right')
  keys: list[Artist] = [panels.key(look) for look in family.values()]
  keys += [panels.verdict_key(name, hollow=name == cache) for name in (usual, cache)]
  labels.legend(figure, keys, columns=len(keys))
  labels.settle(figure)
  for axes, sizes in zip(every, shown, strict=True):
    panels.log_ticks(axes, sizes, [min(sizes), max(sizes)])


def knees(figure: Figure, summaries: Sequence[Mapping[str, Any]], title: str) -> None:
  """MLA's accuracy against the bits that its cache keeps, over those that a record holds.

  Of latents of separate runs, as recall.knee has them. Where the cache is what binds, sweeps over
  records of unlike size lie on one line.
  """
  axes = figure.subplots()
  labels.headline(figure, title)
  keys: list[Artist] = []
  sizes = []
  for summary, line in zip(summaries, itertools.cycle(('-', '--', ':', '-.')), strict=False):
    probe = summary['probe']
    bits = probe['bits_held'] / probe['records']
    knob: Sequence[str] = next(iter(summary['knobs']), [])
    points = sorted(
      (8 * arm['kv_cache_bytes_per_token'] / bits, arm['recall']['mean_accuracy'])
      for arm in summary['arms']
      if arm['arm'] in knob
    )
    sizes += [x for x, _ in points]
    colour = styles(['mla'])['mla'].colour
    keys += axes.plot(
      *zip(*points, strict=True), color=colour, linestyle=line, marker='.',
      label=f'{probe["task"]}, {bits:.3g} bits a record',
    )  # fmt: skip
  panels.log_axis(axes, panels.log_limits(sizes))
  axes.set_xlabel('bits of the cache for each bit of a record (log scale)')
  axes.set_ylabel('share of answers that are right')
  labels.legend(figure, keys, columns=2)
  labels.settle(figure)
  panels.log_ticks(axes, sizes, [min(sizes), max(sizes)])
