"""Axes on which arms stand: log scales, a break where a few lie far off, bars and names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from mla.plots import labels
from mla.plots.styles import GREY, Number, Style

SIDE = 0.024  # of the axis' width, between arms of equal bytes
APART = 0.6  # a gap this much of the crowd's height makes the axis break
ASIDE = 6  # points: how far right of its marker an arm's seeds stand
MANY = 14  # names that find a place at the usual height


class Point(NamedTuple):
  middle: Number
  low: Number
  high: Number
  seeds: Sequence[Number]


def grow(figure: Figure, arms: int) -> None:
  """More height where many names must find a place."""
  width, height = figure.get_size_inches()
  figure.set_size_inches(width, height + 0.12 * max(0, arms - MANY))


def log_limits(values: Sequence[Number]) -> tuple[Number, Number]:
  """The ends of a log axis that shows these with some room for names."""
  pad = 2 ** (0.17 * np.log2(max(values) / min(values)) or 0.4)
  return min(values) / pad, max(values) * pad


def side_by_side(values: Sequence[Number], limits: tuple[Number, Number]) -> list[Number]:
  """Where each stands on a log axis: equals beside each other, but never past another value."""
  unlike = sorted(set(values))
  width = np.log2(limits[1] / limits[0])
  found, met = [], dict.fromkeys(unlike, 0)
  for value in values:
    count = values.count(value)
    nearest = min([abs(np.log2(value / other)) for other in unlike if other != value] or [width])
    step = min(SIDE * width, 0.8 * nearest / max(count - 1, 1), 0.7 * width / count)
    found.append(float(value * 2 ** ((met[value] - (count - 1) / 2) * step)))
    met[value] += 1
  return found


def log_axis(axes: Axes, limits: tuple[Number, Number]) -> None:
  axes.set_xscale('log', base=2)
  axes.minorticks_off()
  axes.set_xlim(limits)
  axes.grid(alpha=0.3)
  # Of height, for the layout; log_ticks are the real ones. Between 40 and 48 no power of two lies.
  axes.set_xticks([np.sqrt(limits[0] * limits[1])], ['1'])


def log_ticks(axes: Axes, values: Sequence[Number], first: Sequence[Number]) -> None:
  unlike = sorted(set(values))
  labels.ticks(axes, unlike, [f'{value:,.0f}' for value in unlike], first)


def axis_labels(
  figure: Figure, rows: Sequence[Axes], x: str, y: str = 'validation loss, nats per token'
) -> None:
  rows[-1].set_xlabel(x)
  if len(rows) == 1:
    rows[0].set_ylabel(y)
  else:
    figure.supylabel(y, fontsize='medium')


def key(look: Style) -> Line2D:
  return Line2D([], [], linestyle='', marker=look.marker, color=look.colour, label=look.label)


def verdict_key(text: str, hollow: bool = False, pale: bool = False) -> Line2D:
  face, alpha = 'white' if hollow else GREY, 0.4 if pale else 1
  return Line2D(
    [], [], linestyle='', marker='o', color=GREY, markerfacecolor=face, alpha=alpha, label=text
  )


def make(figure: Figure, points: Sequence[Point], *shown: tuple[Number, Number]) -> list[Axes]:
  """Axes from the top: one, or two with a break where a few points lie far from the crowd.

  `shown` are ranges that the axes should show too. Of an arm whose interval or seeds reach much
  farther than most only a part counts; the rest will be cut off.
  """
  middles = np.array([point.middle for point in points])
  halves = np.array([point.high - point.low for point in points]) / 2
  usual = max(3 * np.median(halves), float(np.subtract(*np.percentile(middles, [75, 25]))))
  spans = [
    (
      max(min(point.low, *point.seeds, point.middle), point.middle - usual),
      min(max(point.high, *point.seeds, point.middle), point.middle + usual),
    )
    for point in points
  ]
  parts = _parts([(*span, 1) for span in spans] + [(*span, 0) for span in shown])
  shares = [sum(low <= middle <= high for middle in middles) for low, high in parts]
  few = min(0.5, max(0.22, min(shares) / len(points)))
  ratios = [1.0] if len(parts) == 1 else [few, 1 - few] if shares[0] < shares[1] else [1 - few, few]
  grid = {'height_ratios': ratios, 'hspace': 0.02}
  rows = list(figure.subplots(len(parts), sharex=True, squeeze=False, gridspec_kw=grid)[:, 0])
  for axes, (low, high), ratio in zip(rows, parts, ratios, strict=True):
    flat = high - low <= 1e-9 * abs(high)  # but for rounding
    pad = 0.02 * abs(high) or 1.0 if flat else 0.12 * (high - low)
    axes.set_ylim(low - pad, high + 1.4 * pad)
    axes.yaxis.set_major_locator(MaxNLocator('auto' if ratio > 0.5 else 4, prune='both'))
    axes.ticklabel_format(axis='y', useOffset=False)
    axes.spines[['top', 'right']].set_visible(False)
  if len(rows) == 2:
    rows[0].spines['bottom'].set_visible(False)
    rows[0].tick_params(axis='x', length=0)
    for axes, height in zip(rows, (0, 1), strict=True):
      slash = Line2D([0], [height], transform=axes.transAxes, color='black', clip_on=False)
      slash.set(marker=[(-1, -0.6), (1, 0.6)], markersize=9)
      axes.add_artist(slash)
  return rows


def _parts(spans: Sequence[tuple[Number, Number, int]]) -> list[tuple[Number, Number]]:
  """One range that holds all spans, or two, the upper first, where a gap sets the fewer apart.

  A span is its low and high end, and how many points it counts for.
  """
  spans = sorted(spans)
  points = sum(span[2] for span in spans)
  found: tuple[int, list[tuple[Number, Number]]] | None = None
  for cut in range(1, len(spans)):
    below = (spans[0][0], max(span[1] for span in spans[:cut]))
    above = (spans[cut][0], max(span[1] for span in spans[cut:]))
    under = sum(span[2] for span in spans[:cut])
    many, crowd = max((under, below), (points - under, above))
    gap = above[0] - below[1]
    apart = many >= max(3, points // 2 + 1) and gap > max(0, APART * (crowd[1] - crowd[0]))
    if apart and (found is None or many < found[0]):  # the smallest crowd: all that squash it go
      found = (many, [above, below])
  return found[1] if found else [(spans[0][0], max(span[1] for span in spans))]


def panel_of(rows: Sequence[Axes], height: Number) -> Axes:
  return next((axes for axes in rows if axes.get_ylim()[0] <= height), rows[-1])


def draw(
  rows: Sequence[Axes],
  x: Number,
  point: Point,
  look: Style,
  hollow: bool = False,
  pale: bool = False,
) -> None:
  """A marker with its interval, cut off with an arrow where it leaves its axes; and its seeds."""
  axes = panel_of(rows, point.middle)
  low, high = axes.get_ylim()
  ends = max(point.low, low), min(point.high, high)
  looks: dict[str, Any] = {'color': look.colour, 'alpha': 0.4 if pale else 1}
  if ends[1] > ends[0]:
    axes.plot([x, x], ends, linewidth=1.3, zorder=2, **looks)
    caps = (CARETDOWN if point.low < low else '_', CARETUP if point.high > high else '_')
    for end, cap in zip(ends, caps, strict=True):
      axes.plot([x], [end], marker=cap, markersize=6, zorder=2, **looks)
  spot: dict[str, Any] = {'marker': look.marker, 'markersize': 6.5}
  axes.plot([x], [point.middle], color='white', zorder=3, **spot)  # a pale one lets no line through
  face = 'white' if hollow else look.colour
  axes.plot([x], [point.middle], markerfacecolor=face, zorder=4, **spot, **looks)
  aside = axes.transData + ScaledTranslation(ASIDE / 72, 0, axes.figure.dpi_scale_trans)
  axes.plot(
    [x] * len(point.seeds), point.seeds, '.', color=look.colour, markersize=5, alpha=0.4,
    markeredgewidth=0, transform=aside, zorder=2,
  )  # fmt: skip


def name(
  rows: Sequence[Axes],
  points: Sequence[Point],
  places: Sequence[Number],
  told: Sequence[str],
  colours: Sequence[str],
  behind: Sequence[Sequence[tuple[Number, Number]]] = (),
) -> None:
  """The points' names beside them; what finds no place is counted under the axes.

  `behind` are lines, as points (data), that names should not lie on.
  """
  left_out = 0
  for axes in rows:
    low, high = axes.get_ylim()
    here = [i for i, point in enumerate(points) if panel_of(rows, point.middle) is axes]
    bars = [
      [(places[i], max(points[i].low, low)), (places[i], min(points[i].high, high))] for i in here
    ]
    aside = [labels.moved(axes, place, ASIDE) for place in places]
    seeds = [[(aside[i], seed)] for i in here for seed in points[i].seeds]
    left_out += labels.place(
      axes,
      [[(places[i], points[i].middle), *bar] for i, bar in zip(here, bars, strict=True)],
      [told[i] for i in here],
      [colours[i] for i in here],
      [*bars, *seeds, *behind],
    )
  if left_out:
    below = rows[-1].get_xlabel()
    rows[-1].set_xlabel(f'{below}; {left_out} names left out for want of room')
