"""Text that overlaps nothing: titles are wrapped, ticks thinned, names put where there is room.

All are measured on the figure as it is drawn, so the layout is settled first and then kept.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.optimize import isotonic_regression

from mla.plots.styles import GREY, SMALL, Number

TITLE = 12  # points
GAP = 2.5  # points between a text and what it must not touch
REACH = (4, 7, 10, 15, 21, 28, 36, 46, 58, 72, 90, 112, 140, 175, 220, 280, 350)  # points
# What it costs to lie on things, in points of distance; text on text is never drawn.
ON_TEXT, ON_MARKER, ON_LINE, CROSSED, FROM_BAR = 1e6, 2000.0, 100.0, 150.0, 5.0
BESIDE_RIVAL, NEAR = 20.0, 10  # to lie this near (points) to another's marker: whose name is it?


def headline(figure: Figure, title: str, remark: str = '') -> None:
  """The finding, and under it, smaller, how to read it; both wrapped to the figure."""
  width = figure.bbox.width - 20 * figure.dpi / 72
  told = wrapped(figure, title, width, TITLE, 'bold')
  figure.suptitle(told, x=0.012, ha='left', fontsize=TITLE, fontweight='bold')
  if remark:
    top = figure.axes[0]
    # 0.85: beside the tick labels of the axes it stands over.
    top.set_title(
      wrapped(figure, remark, 0.85 * width, SMALL), loc='left', fontsize=SMALL, color=GREY
    )


def panel_title(axes: Axes, text: str) -> None:
  figure = _figure(axes)
  told = wrapped(figure, text, 0.7 * figure.bbox.width, TITLE - 1, 'bold')
  axes.set_title(told, loc='left', fontsize=TITLE - 1, fontweight='bold')


def wrapped(figure: Figure, text: str, width: Number, size: Number, weight: str = 'normal') -> str:
  """Lines of at most `width` pixels."""
  probe = figure.text(0, 0, '', fontsize=size, fontweight=weight)
  lines = ['']
  for word in text.split():
    probe.set_text(f'{lines[-1]} {word}'.strip())
    if lines[-1] and probe.get_window_extent().width > width:
      lines.append(word)
    else:
      lines[-1] = probe.get_text()
  probe.remove()
  return '\n'.join(lines)


def settle(figure: Figure) -> None:
  """Lays the figure out once and keeps it so: labels are placed by what is where now."""
  figure.draw_without_rendering()
  figure.set_layout_engine('none')


def legend(figure: Figure, looks: Sequence[Artist], columns: int) -> None:
  """Below the axes, filled row by row (matplotlib's own order is by columns)."""
  columns = min(columns, len(looks))
  ordered = [look for column in range(columns) for look in looks[column::columns]]
  figure.legend(
    handles=ordered, loc='outside lower center', ncols=columns, fontsize=SMALL, frameon=False,
    handletextpad=0.5, columnspacing=1.4,
  )  # fmt: skip


def room_at_the_right(figure: Figure, texts: Sequence[str]) -> None:
  """Keeps the width of the widest text free at the right of the axes."""
  probe = figure.text(0, 0, '', fontsize=SMALL)
  widths = [0.0]
  for text in texts:
    probe.set_text(text)
    widths.append(probe.get_window_extent().width)
  probe.remove()
  right = 1 - (max(widths) + 12 * figure.dpi / 72) / figure.bbox.width
  figure.set_layout_engine('constrained', rect=(0, 0, right, 1))


def ticks(
  axes: Axes, values: Sequence[Number], told: Sequence[str], first: Sequence[Number]
) -> None:
  """A tick at each value, its text only where it does not touch another's; `first` go first."""
  axes.set_xticks(values, [''] * len(values))
  order = [*dict.fromkeys([*first, *sorted(values)])]
  half_gap = 3 * axes.figure.dpi / 72
  taken: list[tuple[Number, Number]] = []
  shown = [''] * len(values)
  probe = axes.text(0, 0, '', fontsize=axes.xaxis.get_ticklabels()[0].get_fontsize())
  for value in order:
    place = list(values).index(value)
    probe.set_text(told[place])
    half = probe.get_window_extent().width / 2 + half_gap
    middle = axes.transData.transform((value, 1))[0]
    if all(middle + half <= low or middle - half >= high for low, high in taken):
      taken.append((middle - half, middle + half))
      shown[place] = told[place]
  probe.remove()
  axes.set_xticks(values, shown)


def beside(
  axes: Axes, heights: Sequence[Number], told: Sequence[str], colours: Sequence[str]
) -> None:
  """Texts at the right edge of the axes, at given heights (data) or as near as they fit."""
  texts = [
    axes.annotate(
      text, (1, height), xycoords=('axes fraction', 'data'), xytext=(6, 0),
      textcoords='offset points', va='center', color=colour, fontsize=SMALL, annotation_clip=False,
    )
    for text, height, colour in zip(told, heights, colours, strict=True)
  ]  # fmt: skip
  _figure(axes).draw_without_rendering()
  scale = 72 / axes.figure.dpi
  wanted = np.array([axes.transData.transform((1, height))[1] for height in heights]) * scale
  tall = np.array([text.get_window_extent().height for text in texts]) * scale + GAP
  order = np.argsort(wanted, kind='stable')
  above = np.cumsum(np.concatenate([[0], (tall[order][1:] + tall[order][:-1]) / 2]))
  # The nearest heights that keep their order and distances, as a whole between the axes' ends.
  lowest = isotonic_regression(wanted[order] - above).x
  low = axes.bbox.y0 * scale + tall[order[0]] / 2
  high = axes.bbox.y1 * scale - tall[order[-1]] / 2 - above[-1]
  found = np.clip(lowest, low, max(low, high)) + above
  for index, height in zip(order, found, strict=True):
    texts[index].set_position((6, height - wanted[index]))


def place(
  axes: Axes,
  points: Sequence[Sequence[tuple[Number, Number]]],
  told: Sequence[str],
  colours: Sequence[str],
  behind: Sequence[Sequence[tuple[Number, Number]]] = (),
) -> int:
  """Writes each text near its points, clear of all texts, markers and lines where it can be.

  A text's points (data) are its marker and the ends of its bar. `behind` are lines or dots, as
  points (data), that are better left free. A text far from its points gets a line to one of them.
  Returns how many found no free place and were left out.
  """
  if not points:
    return 0
  figure, scale = _figure(axes), 72 / axes.figure.dpi
  ends = np.array([axes.transData.transform(own) for own in points]) * scale  # [n, 3, 2]
  spots = ends[:, 0]
  texts = [
    axes.annotate(
      text, own[0], xytext=(0, 0), textcoords='offset points', ha='center', va='center',
      color=colour, fontsize=SMALL, annotation_clip=False, linespacing=1.05, zorder=5,
    )
    for text, own, colour in zip(told, points, colours, strict=True)
  ]  # fmt: skip
  figure.draw_without_rendering()
  sizes = np.array([[box.width, box.height] for box in map(Text.get_window_extent, texts)]) * scale
  frame = np.array([axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1]) * scale
  markers = np.hstack([spots - 4, spots + 4])
  lines = _thin_boxes(axes, behind) * scale
  boxes = np.full((len(texts), 4), np.nan)  # those placed so far
  starts = spots.copy()
  costs = np.full(len(texts), np.inf)
  near = np.linalg.norm(spots[:, None] - spots[None], axis=-1)
  crowded = np.argsort(-(near < 60).sum(1), kind='stable')
  for _ in range(3):  # once in order of need, then again now that all others are known
    for this in crowded:
      others = np.delete(boxes, this, 0)
      rivals = np.delete(markers, this, 0)
      tried, start = _candidates(ends[this], sizes[this], frame)
      if not len(tried):
        continue
      cost = _distance(start, tried) + FROM_BAR * (start != spots[this]).any(1)
      cost = cost + ON_TEXT * _hits(tried, others, GAP)
      cost += ON_MARKER * (_hits(tried, rivals, 1) + _hits(tried, markers[this : this + 1], GAP))
      cost += BESIDE_RIVAL * _hits(tried, rivals, NEAR) + ON_LINE * _hits(tried, lines, 2.5)
      cost += CROSSED * _crossed(start, tried, np.vstack([others, rivals]))
      best = int(np.argmin(cost))
      boxes[this], starts[this], costs[this] = tried[best], start[best], cost[best]
  left_out = 0
  for this, text in enumerate(texts):
    if costs[this] >= ON_TEXT or np.isnan(boxes[this, 0]):
      text.remove()
      left_out += 1
      continue
    middle = (boxes[this, :2] + boxes[this, 2:]) / 2
    text.set_position(tuple(middle - spots[this]))
    if _distance(starts[this], boxes[this : this + 1])[0] > 12:
      leader = np.array([starts[this], _nearest(starts[this], boxes[this])])
      way = axes.transData.inverted().transform(leader / scale)
      axes.plot(
        *way.T, color=colours[this], linewidth=0.6, alpha=0.6, zorder=1, scalex=False, scaley=False
      )
  return left_out


def moved(axes: Axes, x: Number, points: Number) -> Number:
  """The x (data) that lies so many points to the right."""
  there = axes.transData.transform((x, axes.get_ylim()[0])) + (points * axes.figure.dpi / 72, 0)
  return float(axes.transData.inverted().transform(there)[0])


def _figure(axes: Axes) -> Figure:
  figure = axes.figure
  assert isinstance(figure, Figure)
  return figure


def _candidates(
  ends: np.ndarray, size: np.ndarray, frame: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Boxes [m,4] of a size around any of the points, in the frame; and whose [m,2]."""
  angles = np.radians(90 + np.arange(32) * 360 / 32)
  ways = np.stack([np.cos(angles), np.sin(angles)], -1)
  ways[np.abs(ways) < 1e-9] = 0
  with np.errstate(divide='ignore'):
    edge = np.min(size / 2 / np.abs(ways), axis=-1)  # from a box's middle to its edge that way
  far = np.array(REACH)[:, None] + edge[None]
  starts = np.broadcast_to(ends[None, None], (*far.shape, *ends.shape))
  middles = starts + (far[..., None] * ways[None])[:, :, None]
  boxes = np.concatenate([middles - size / 2, middles + size / 2], -1).reshape(-1, 4)
  inside = (boxes[:, :2] >= frame[:2] + GAP).all(1) & (boxes[:, 2:] <= frame[2:] - GAP).all(1)
  return boxes[inside], starts.reshape(-1, 2)[inside]


def _hits(boxes: np.ndarray, others: np.ndarray, gap: Number) -> np.ndarray:
  """How many of the others [k,4] each box [m,4] touches, with a gap; NaN touches nothing."""
  a, b = boxes[:, None], others[None]
  apart_x = (a[..., 0] - gap < b[..., 2]) & (b[..., 0] < a[..., 2] + gap)
  apart_y = (a[..., 1] - gap < b[..., 3]) & (b[..., 1] < a[..., 3] + gap)
  return (apart_x & apart_y).sum(1)


def _distance(spot: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  return np.linalg.norm(_nearest(spot, boxes) - spot, axis=-1)


def _nearest(spot: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  return np.clip(spot, boxes[..., :2], boxes[..., 2:])


def _crossed(spots: np.ndarray, boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
  """How many of the others [k,4] the line from each spot [m,2] to its box [m,4] runs through."""
  way = (_nearest(spots, boxes) - spots)[:, None]
  with np.errstate(divide='ignore', invalid='ignore'):  # a line along an axis; NaN crosses nothing
    sides = [(others[None, :, side] - spots[:, None]) / way for side in (slice(2), slice(2, 4))]
  enters, leaves = np.minimum(*sides).max(-1), np.maximum(*sides).min(-1)
  return (np.maximum(enters, 0) < np.minimum(leaves, 1)).sum(1)


def _thin_boxes(axes: Axes, lines: Sequence[Sequence[tuple[Number, Number]]]) -> np.ndarray:
  """Lines of points (data) as small boxes [k,4] in pixels, cut where they slant."""
  boxes = []
  for line in lines:
    ends = axes.transData.transform(np.asarray(line, float))
    for a, b in pairwise(ends) if len(ends) > 1 else [(ends[0], ends[0])]:
      slants = min(abs(b - a)) > 1
      stops = np.linspace(a, b, 9 if slants else 2)
      boxes += [np.concatenate([np.minimum(p, q), np.maximum(p, q)]) for p, q in pairwise(stops)]
  return np.array(boxes).reshape(-1, 4)
