"""What is wrong with a figure, by the boxes of what is really drawn: for tests of any picture."""

from itertools import combinations
from unittest import mock

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 0.5  # pixels: rounding


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
  """Every text that drawing the figure draws, and its box in pixels."""
  drawn: list[Text] = []
  draw = Text.draw

  def record(self, *args, **kwargs):
    if self.get_visible() and self.get_text().strip() and self not in drawn:
      drawn.append(self)
    return draw(self, *args, **kwargs)

  with mock.patch.object(Text, 'draw', record):
    FigureCanvasAgg(figure).draw()
  # Of an annotation the text alone, without its arrow.
  return [(text.get_text(), Text.get_window_extent(text)) for text in drawn]


def faults(figure: Figure) -> list[str]:
  """Texts that overlap another (titles, ticks and legends too) or leave the canvas."""
  boxes = texts(figure)
  found = [f'no text at all: {figure}'] if not boxes else []
  for text, box in boxes:
    low, high = np.array([box.min, box.max])
    if (low < -SLACK).any() or (high > figure.bbox.max + SLACK).any():
      found.append(f'{text!r} leaves the canvas')
  for (one, box), (other, rival) in combinations(boxes, 2):
    if _overlap(box, rival):
      found.append(f'{one!r} overlaps {other!r}')
  return found


def covered(figure: Figure) -> list[str]:
  """Texts in the axes that lie on the middle of a single marker."""
  boxes = texts(figure)
  found = []
  for axes in figure.axes:
    for line in axes.get_lines():
      data = np.asarray(line.get_xydata(), float)
      if line.get_marker() in ('', ' ', 'None', None, '.', '_') or len(data) != 1:
        continue
      x, y = line.get_transform().transform(data)[0]
      marker = Bbox([[x - 3, y - 3], [x + 3, y + 3]])
      if axes.bbox.contains(x, y):
        found += [f'{text!r} lies on a marker' for text, box in boxes if _overlap(box, marker)]
  return found


def _overlap(one: Bbox, other: Bbox) -> bool:
  low, high = np.maximum(one.min, other.min), np.minimum(one.max, other.max)
  return bool((high - low > SLACK).all())
