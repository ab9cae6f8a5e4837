"""How often a sweep's results have been looked at, and what a look may cost.

Who looks after three seeds, then adds two and looks again, has two chances to be misled: looking
after 3, 5 and 6 seeds makes a nominal error of 5 % one of 10 % (Armitage, McPherson and Rowe, JRSS
A 132, 1969). So a look gets a part of the 5 %: 1 % each of the first four, then each half of the
one before (0.5 %, 0.25 %, ...), which is 5 % in all however often one looks. The first gets no more
than later ones, for those have the most seeds, and it is the report that proposes them.

A look is a report over other results than any before it (of other seeds, or of more trials), or
against another reference; DIR/looks.json lists them. To write the same report again, or with
another margin, is none: the bounds hold for all margins.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla import files
from mla.errors import UserError

LEVEL = 0.01  # of each of the first looks
FIRST = 4
TOTAL = 0.05  # of all of them

Look = Mapping[str, Any]  # 'seeds' and number of 'trials' that were done, 'reference'


def level(number: int) -> float:
  """The error that look `number` (1, 2, ...) may make."""
  return LEVEL * 0.5 ** max(0, number - FIRST)


def history(folder: Path, now: Look) -> tuple[list[Look], int]:
  """All looks, `now` among them, and which it is (from 1); UserError if the list is damaged."""
  before = read(folder)
  return (before, before.index(now) + 1) if now in before else ([*before, now], len(before) + 1)


def read(folder: Path) -> list[Look]:
  """The looks so far, [] if there was none; UserError if the list is damaged."""
  path = folder / 'looks.json'
  if not os.path.lexists(path):
    return []
  cure = 'take it from a copy, or remove it and know that looks are counted anew'
  found = files.read_json(path, cure)
  if not isinstance(found, list) or not all(_is_look(look) for look in found):
    raise UserError(f'{path}: is not a list of looks; {cure}')
  return found


def _is_look(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('seeds'), list)
    and all(isinstance(seed, int) for seed in value['seeds'])
    and isinstance(value.get('trials'), int)
    and isinstance(value.get('reference'), str)
  )


def record(folder: Path, looks: Sequence[Look]) -> None:
  lines = ',\n'.join(f'  {json.dumps(look)}' for look in looks)
  files.write_whole(folder / 'looks.json', f'[\n{lines}\n]\n')
