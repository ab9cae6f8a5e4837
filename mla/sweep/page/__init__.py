"""report.html: a sweep's report as one page that needs no network.

contents.py says what it shows; template.html, page.css and page.js show it, with plotly.js, which
the package plotly carries. All numbers and words are made in Python: JavaScript chooses and sorts.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mla import files
from mla.sweep import results
from mla.sweep.page.contents import contents

NAME = 'report.html'


def write(folder: Path, defaults: Mapping[str, Any]) -> str:
  """Writes the page of a sweep whose report has been written; returns what to say of it.

  `defaults` are configs/base.py's fields, flat. Without plotly there is none: it is an extra, 40 MB
  that a machine which only trains has no use for. UserError for a damaged frontier.json.
  """
  try:
    from plotly.offline import get_plotlyjs
  except ImportError:
    return f"no {NAME}: for one, pip install -c constraints.txt -e '.[report]'"
  summary = files.read_json(folder / 'frontier.json', 'write the report again')
  lines = results.read_lines(folder / 'results.jsonl')
  made = whole(contents(folder, summary, lines, defaults), get_plotlyjs())
  try:
    files.write_whole(folder / NAME, made)
  except OSError as error:
    raise files.cannot(f'{folder / NAME}: cannot be written', error, 'remove it') from error
  return f'written: {folder / NAME}'


def whole(shown: Mapping[str, Any], plotly: str) -> str:
  """The page's HTML; `plotly` is the library's JavaScript."""
  folder = resources.files(__name__)
  page = (folder / 'template.html').read_text()
  parts = {
    'STYLE': (folder / 'page.css').read_text(),
    'PLOTLY': plotly,
    'CONTENTS': embedded(shown),
    'SCRIPT': (folder / 'page.js').read_text(),
  }
  for name, text in parts.items():
    page = page.replace(f'<!--{name}-->', text, 1)
  return page


def embedded(shown: Mapping[str, Any]) -> str:
  """JSON that can stand in a script element: whatever names say, nothing in it ends the element."""
  return json.dumps(shown, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
