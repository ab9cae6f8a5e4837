"""How each variant looks and is called, how an arm's name is shortened, and how a file is written.

Colours are Okabe and Ito's, told apart with any colour vision; the marker says the variant again in
print. Sizes are for a picture 8 inches wide that is shown some 800 pixels wide.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from mla import files
from mla.attention import VARIANTS

Number = int | float  # results hold both, and the tests check annotations for real
SMALL = 8.5  # points, of names and remarks
GREY, PALE, BAND = '#555555', '#999999', '#E8E8E8'  # of remarks; of lines and areas behind the data
LINE, LINES = 18, 3  # letters of a line of a label, and lines


class Style(NamedTuple):
  label: str
  colour: str
  marker: str


# In the order of VARIANTS: the palette, its last three colours once more with other markers.
LOOKS = (
  *(('#000000', 's'), ('#0072B2', '^'), ('#009E73', 'v'), ('#D55E00', 'o')),
  *(
    (colour, marker)
    for markers in ('DPX', '*hd')
    for colour, marker in zip(('#CC79A7', '#56B4E9', '#E69F00'), markers, strict=True)
  ),
)
STYLES = {
  name: Style(variant.label, *LOOKS[index % len(LOOKS)])
  for index, (name, variant) in enumerate(VARIANTS.items())
}
# Fields as an arm's name has them where a sweep makes it, in the letters the project writes them.
LETTERS = {
  'num_kv_heads': 'K', 'num_heads': 'H', 'value_head_dim': 'V', 'head_dim': 'N',
  'query_latent_dim': 'Q', 'latent_dim': 'C', 'rope_dim': 'R', 'num_layers': 'L', 'd_model': 'D',
  'ffn_dim': 'F', 'seq_len': 'T',
}  # fmt: skip


def styles(variants: Iterable[str]) -> dict[str, Style]:
  """{variant: its style}, in the order of VARIANTS; one that another program's results name, which
  this has not, gets a free look."""
  found = sorted(
    set(variants), key=lambda name: (list(STYLES).index(name) if name in STYLES else 99, name)
  )
  fresh = [name for name in found if name not in STYLES]
  return {
    name: STYLES[name]
    if name in STYLES
    else Style(name.upper(), *LOOKS[(len(STYLES) + fresh.index(name)) % len(LOOKS)])
    for name in found
  }


def style(variant: str) -> Style:
  """One variant's style, for a picture of nothing else."""
  return styles([variant])[variant]


def short(name: str) -> str:
  """An arm's name on up to three short lines: 'mqa-8-heads-of-16' as 'MQA 8 heads / of 16'."""
  words = re.split(r'[-_,\s]+', ','.join(_field(part) for part in name.split(',')))
  words = [STYLES[word].label if word in STYLES else word for word in words if word]
  words = [re.sub(r'^c(\d+)$', r'C=\1', word) for word in words]
  lines = textwrap.wrap(' '.join(words), LINE) or [name]
  for width in range(LINE, 7, -1):  # as even as they can be
    even = textwrap.wrap(' '.join(words), width)
    lines = even if len(even) == len(lines) else lines
  if len(lines) > LINES:  # both ends tell more than the beginning does
    lines = [*lines[: LINES - 1], '…' + lines[-1]]
  return '\n'.join(lines)


def one_line(text: str) -> str:
  return text.replace('\n', ' ')


def _field(part: str) -> str:
  field, equals, value = part.partition('=')
  if not equals:
    return part
  return value if field == 'attention' else f'{LETTERS.get(field, field)}={value}'


def names(arms: Iterable[str]) -> dict[str, str]:
  """{arm: its short name}; two that would read alike keep their whole names."""
  shortened = {arm: short(arm) for arm in arms}
  told = list(shortened.values())
  return {
    arm: '\n'.join(textwrap.wrap(arm, LINE)) if told.count(text) > 1 else text
    for arm, text in shortened.items()
  }


def spoken(arm: str) -> str:
  """An arm in a sentence: 'mqa-8-heads-of-16' as 'MQA with 8 heads of 16', 'mqa' as 'MQA'."""
  family, _, rest = arm.partition('-')
  if family not in STYLES or not rest or rest.isdigit():
    return one_line(short(arm))
  return f'{STYLES[family].label} with {one_line(short(rest.removeprefix("with-")))}'


def share(part: Number, whole: Number) -> str:
  """A part of a whole in a sentence: '1/8' where that is so, else per cent."""
  ratio = whole / part
  if ratio >= 1.5 and abs(ratio - round(ratio)) < 0.01 * ratio:
    return f'1/{round(ratio)}'
  return f'{100 / ratio:.0f} %' if ratio < 100 else f'{100 / ratio:.2g} %'


def save(draw: Callable[..., None], path: Path, *args) -> None:
  """Draws on a new figure and writes the file whole; its ending says the format. No display needed.

  Raises UserError or MachineError if the file cannot be written; what was there stays.
  """
  figure = Figure(figsize=(8, 5.2), layout='constrained')
  draw(figure, *args)
  picture = io.BytesIO()
  figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
  try:
    files.write_whole(path, picture.getvalue())
  except OSError as error:
    raise files.cannot(f'{path}: cannot be written', error, 'choose another path') from error
