"""How absorption moves a product: what is multiplied with what, expanded and absorbed."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from ml_collections import ConfigDict

from mla.plots import labels
from mla.plots.styles import GREY, SMALL, Number, style


class Box(NamedTuple):
  x: Number  # of the middle, in the panel's units
  y: Number
  text: str
  cached: bool = False


WIDE, HIGH = 1.5, 0.62


def absorption(figure: Figure, config: ConfigDict) -> None:
  """Two panels, the score of one query and one cached token: keys expanded, and absorbed."""
  H, N, R, C = config.num_heads, config.head_dim, config.rope_dim, config.latent_dim
  V = config.value_head_dim or N
  above, below = figure.subplots(2, 1)
  query = Box(0, 1, f'query\nH x N = {H} x {N}')
  latent = Box(6, 1, f'latent\nC = {C}, cached', cached=True)
  rotary = Box(6, 0, f'rotary key\nR = {R}, cached', cached=True)
  turned = Box(0, 0, f'turned query\nH x R = {H} x {R}')
  keys = Box(4, 1, f'keys\nH x N = {H} x {N}')
  moved = Box(2, 1, f'moved query\nH x C = {H} x {C}')
  labels.panel_title(
    above,
    f"Expanded: each head's keys and values are made again, {H * (N + V)} numbers a token "
    'and layer',
  )
  _draw(above, [query, latent, keys, rotary, turned])
  _arrow(above, latent, keys, r'$W_{UK}$')
  _product(above, query, keys)
  _product(above, turned, rotary)
  labels.panel_title(
    below, f'Absorbed: the query moves instead, once, and reads {C + R} numbers a token and layer'
  )
  _draw(below, [query, latent, moved, rotary, turned])
  _arrow(below, query, moved, r'$W_{UK}^\top$')
  _product(below, moved, latent)
  _product(below, turned, rotary)
  labels.settle(figure)


def _draw(axes: Axes, boxes: list[Box]) -> None:
  colour = style('mla').colour
  for box in boxes:
    face = colour if box.cached else 'white'
    axes.add_patch(
      FancyBboxPatch(
        (box.x - WIDE / 2, box.y - HIGH / 2), WIDE, HIGH, boxstyle='round,pad=0,rounding_size=0.08',
        facecolor=face, alpha=0.25 if box.cached else 1, edgecolor=colour if box.cached else GREY,
      )
    )  # fmt: skip
    axes.text(box.x, box.y, box.text, ha='center', va='center', fontsize=SMALL)
  axes.set(xlim=(-0.9, 6.9), ylim=(-0.45, 1.55))
  axes.set_axis_off()


def _arrow(axes: Axes, start: Box, end: Box, text: str) -> None:
  way = 1 if end.x > start.x else -1
  ends = start.x + way * WIDE / 2, end.x - way * WIDE / 2
  look = {'arrowstyle': '-|>', 'color': GREY}
  axes.annotate('', (ends[1], end.y), (ends[0], start.y), arrowprops=look)
  axes.text(sum(ends) / 2, end.y + 0.12, text, ha='center', va='bottom', fontsize=SMALL)


def _product(axes: Axes, left: Box, right: Box) -> None:
  """A dotted line between what is multiplied, and the sum of products over it."""
  ends = left.x + WIDE / 2, right.x - WIDE / 2
  axes.plot(ends, [left.y, right.y], color=GREY, linestyle=':', linewidth=1.2)
  axes.text(
    sum(ends) / 2, left.y + 0.08, 'product', ha='center', va='bottom', fontsize=SMALL, color=GREY
  )
