"""What caches and steps cost: horizontal bars, bars of parts, and caches against context."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from mla.plots import labels
from mla.plots.styles import GREY, SMALL, Number, Style, names, one_line, share, style, styles

GB = 1e9
ACCELERATOR = 80 * GB  # an A100's or H100's memory as sold
COINCIDE = 0.03  # lines this near to each other lie on each other
GLYPHS = {'s': '■□', '^': '▲△', 'v': '▼▽', 'o': '●○'}  # markers as letters, full and hollow
# What caches keep, as variants name it, in words and in the order of a bar.
ENTRIES = {'k': 'keys', 'v': 'values', 'latent': 'latent', 'k_rope': 'rotary key'}
# How much white, and what hatching: of series, or of a bar's parts.
TINTS = ((0.0, ''), (0.5, ''), (0.2, '////'), (0.7, '////'))


class Published(NamedTuple):
  """A published model's cache in bfloat16, by its paper's formula: its arrays are not here."""

  name: str
  weights: str
  attention: str
  layers: int  # L
  source: str  # of all that stands here
  kv_heads: int = 0  # K
  head_dim: int = 0  # N
  latent_dim: int = 0  # C
  rope_dim: int = 0  # R

  @property
  def bytes_per_token(self) -> int:
    elements = self.latent_dim + self.rope_dim or 2 * self.kv_heads * self.head_dim
    return elements * self.layers * 2


LLAMA = 'Llama arXiv 2407.21783, table 3'
V2, V3 = 'V2 arXiv 2405.04434, 3.1.2', 'V3 arXiv 2412.19437, 4.2'
PUBLISHED = (
  # The paper gives widths and heads; head_dim is 4096 / 32 and 8192 / 64.
  Published('Llama-3.1-8B', '8B', 'gqa', 32, LLAMA, kv_heads=8, head_dim=128),
  Published('Llama-3.1-70B', '70B', 'gqa', 80, LLAMA, kv_heads=8, head_dim=128),
  Published('DeepSeek-V2', '236B', 'mla', 60, V2, latent_dim=512, rope_dim=64),
  Published('DeepSeek-V3', '671B', 'mla', 61, V3, latent_dim=512, rope_dim=64),
)


def bars(
  figure: Figure,
  series: Mapping[str, Mapping[str, Number]],
  unit: str,
  families: Mapping[str, str] | None = None,
) -> None:
  """{series: {label: value}} as groups of horizontal bars, values written beside them.

  `families` says which variant a label is of, for its colour; else its first word does.
  """
  places = list(next(iter(series.values())))
  colours = _colours(places, families)
  axes = _rows(figure, places, len(series), unit)
  height = 0.8 / len(series)
  for index, values in enumerate(series.values()):
    shift = (index - (len(series) - 1) / 2) * height
    for row, place in enumerate(places):
      fill = _fill(colours[place], index)
      axes.barh([row + shift], [values[place]], height * 0.94, **fill)
      _value(axes, values[place], row + shift)
  if len(series) > 1:
    _fill_legend(figure, list(series))
    labels.headline(figure, _last_of_first(series))
  else:
    labels.headline(figure, _least_of_most(next(iter(series.values()))))
  labels.settle(figure)


def stacks(
  figure: Figure,
  values: Mapping[str, Mapping[str, Number]],
  unit: str,
  families: Mapping[str, str] | None = None,
) -> None:
  """{label: {part: value}} as horizontal bars made of their parts, the sum written beside them.

  A part has the same depth of colour in every bar. Parts may differ from bar to bar.
  """
  places = list(values)
  parts = list(dict.fromkeys(part for of_label in values.values() for part in of_label))
  parts.sort(key=lambda part: list(ENTRIES).index(part) if part in ENTRIES else len(ENTRIES))
  colours = _colours(places, families)
  axes = _rows(figure, places, 1, unit)
  for row, place in enumerate(places):
    left = 0.0
    for part in (part for part in parts if part in values[place]):
      value = values[place][part]
      fill = _fill(colours[place], parts.index(part))
      axes.barh([row], [value], 0.72, left=[left], **fill)
      left += value
    _value(axes, left, row)
  _fill_legend(figure, [ENTRIES.get(part, part) for part in parts])
  labels.headline(figure, _least_of_most({place: sum(values[place].values()) for place in places}))
  labels.settle(figure)


def cache_memory(figure: Figure, sizes: Mapping[str, Mapping[int, Number]]) -> None:
  """{name: {context: bytes}} against context, log scales; under it published models and 80 GB.

  Lines that coincide are dashed in turn and their markers stand side by side: each is seen.
  """
  above, below = figure.subplots(2, 1)
  labels.panel_title(above, _least_of_most({name: sum(sizes[name].values()) for name in sizes}))
  llama, deepseek = PUBLISHED[0], PUBLISHED[-1]
  part = share(deepseek.bytes_per_token, llama.bytes_per_token)
  labels.panel_title(
    below, f"{deepseek.name} ({deepseek.weights}) keeps {part} of {llama.name}'s cache"
  )
  families, short = _families(list(sizes), None), names(sizes)
  family = styles(families.values())
  curves = [Curve(short[name], family[families[name]], False, sizes[name]) for name in sizes]
  published = []
  for index, model in enumerate(PUBLISHED):
    look = style(model.attention)
    hollow = any(other.attention == model.attention for other in PUBLISHED[:index])
    text = (
      f'{GLYPHS[look.marker][hollow]} {model.name}\n'
      f'{look.label}, {model.bytes_per_token / 1e3:,.0f} kB a token\n'
      f'80 GB: {ACCELERATOR / model.bytes_per_token / 1e3:,.0f}k tokens'
    )
    line = {2**k: 2**k * model.bytes_per_token for k in range(12, 22)}
    published.append(Curve(text, look, hollow, line))
  labels.room_at_the_right(figure, [curve.text for curve in (*curves, *published)])
  _draw(above, curves, 'MiB', 2**20)
  _draw(below, published, 'GB', GB)
  below.axhline(ACCELERATOR / GB, color=GREY, linestyle='--', linewidth=1)
  below.annotate(
    'one accelerator: 80 GB', (0, ACCELERATOR / GB), xycoords=('axes fraction', 'data'),
    xytext=(6, 3), textcoords='offset points', color=GREY, fontsize=SMALL,
  )  # fmt: skip
  above.set_xlabel('context of one conversation, tokens (log scale); bfloat16', fontsize=SMALL)
  sources = dict.fromkeys(model.source for model in PUBLISHED)
  cited = labels.wrapped(figure, '; '.join(sources), 0.75 * figure.bbox.width, SMALL)
  below.set_xlabel(
    'context of all conversations, tokens (log scale); bfloat16, weights not counted\n' + cited,
    fontsize=SMALL,
  )
  labels.settle(figure)
  for axes, drawn, unit in ((above, curves, 2**20), (below, published, GB)):
    contexts = sorted({context for curve in drawn for context in curve.sizes})
    told = [_tokens(context) for context in contexts]
    labels.ticks(axes, contexts, told, [])
    labels.beside(
      axes,
      [curve.last / unit for curve in drawn],
      [curve.text for curve in drawn],
      [curve.look.colour for curve in drawn],
    )


def _last_of_first(series: Mapping[str, Mapping[str, Number]]) -> str:
  (first, whole), (last, part) = list(series.items())[0], list(series.items())[-1]
  ratios = [part[place] / whole[place] for place in whole]
  told = dict.fromkeys(share(ratio, 1) for ratio in (min(ratios), max(ratios)))
  return f'{last}: {" to ".join(told)} of {first}'


def _least_of_most(values: Mapping[str, Number]) -> str:
  """Which label has least, and what part of the one with most, in words."""
  small, large = min(values.values()), max(values.values())
  told = {place: one_line(text) for place, text in names(values).items()}
  few = [told[place] for place in values if values[place] == small]
  most = next(told[place] for place in values if values[place] == large)
  if small == large:
    return f'{most}: nothing to compare yet' if len(values) == 1 else 'All have the same'
  whom = ' and '.join(few) if len(few) < 3 else f'{len(few)} of {len(values)}'
  return f'{whom} {"has" if len(few) == 1 else "have"} the least: {share(small, large)} of {most}'


def _tokens(count: int) -> str:
  """'32k' and '2M' where that is so, in powers of two."""
  for size, letter in ((2**20, 'M'), (2**10, 'k')):
    if count % size == 0:
      return f'{count // size}{letter}'
  return f'{count:,}'


class Curve(NamedTuple):
  text: str  # at its end
  look: Style
  hollow: bool  # its markers: a family's second and later ones
  sizes: Mapping[int, Number]  # {context: bytes}

  @property
  def last(self) -> Number:
    return self.sizes[max(self.sizes)]


def _draw(axes: Axes, curves: Sequence[Curve], unit: str, size: Number) -> None:
  for curve in curves:
    same = [other for other in curves if abs(other.last / curve.last - 1) < COINCIDE]
    turn, count = same.index(curve), len(same)
    x, y = list(curve.sizes), [value / size for value in curve.sizes.values()]
    dashes = (turn * 6, (6, 6 * (count - 1))) if count > 1 else '-'
    axes.plot(x, y, color=curve.look.colour, linestyle=dashes, linewidth=1.6)
    aside = ScaledTranslation((turn - (count - 1) / 2) * 8 / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot(
      x, y, curve.look.marker, color=curve.look.colour, markersize=5,
      markerfacecolor='white' if curve.hollow else curve.look.colour,
      transform=axes.transData + aside,
    )  # fmt: skip
  axes.set_xscale('log', base=2)
  axes.set_yscale('log', base=2 if unit == 'MiB' else 10)
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.6g}')
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_ylabel(f'KV cache, {unit} (log scale)')


def _colours(places: Sequence[str], families: Mapping[str, str] | None) -> dict[str, str]:
  known = _families(places, families)
  looks = styles(known.values())
  return {place: looks[known[place]].colour for place in places}


def _families(places: Sequence[str], families: Mapping[str, str] | None) -> dict[str, str]:
  """{label: variant}: as told, else the first word of the label."""
  return {place: (families or {}).get(place, place.split()[0].split('-')[0]) for place in places}


def _fill(colour: str, index: int) -> dict[str, Any]:
  """How the index-th series or part is filled: the same in every bar, in the bar's own colour."""
  white, hatch = TINTS[index % len(TINTS)]
  face = tuple(part + (1 - part) * white for part in to_rgb(colour))
  return {'facecolor': face, 'hatch': hatch, 'edgecolor': 'white', 'linewidth': 0.6}


def _fill_legend(figure: Figure, told: Sequence[str]) -> None:
  looks = [Patch(**_fill(GREY, depth), label=text) for depth, text in enumerate(told)]
  labels.legend(figure, looks, columns=5)


def _value(axes: Axes, value: Number, row: Number) -> None:
  text = f'{value:,.0f}' if abs(value) >= 1000 else f'{value:,.4g}'
  axes.annotate(
    text, (value, row), xytext=(3, 0), textcoords='offset points', va='center', fontsize=8
  )


def _rows(figure: Figure, places: Sequence[str], series: int, unit: str) -> Axes:
  """Axes for a row a label, from the top, high enough that the values' texts do not touch."""
  told = names(places)
  lines = max(max(text.count('\n') + 1 for text in told.values()), series)
  width, height = figure.get_size_inches()
  figure.set_size_inches(width, max(height, 1.2 + len(places) * (0.06 + 0.15 * lines)))
  axes = figure.subplots()
  axes.set_yticks(range(len(places)), [told[place] for place in places], fontsize=SMALL)
  axes.set_ylim(len(places) - 0.4, -0.6)
  axes.tick_params(axis='y', length=0)
  axes.spines[['top', 'right']].set_visible(False)
  axes.margins(x=0.12)
  axes.set_xlabel(unit)
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:,g}')
  return axes
