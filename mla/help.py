"""What --help prints: the command's docstring, its flags, the config's fields. Imports no JAX."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from absl import flags

from mla.fields import flatten

COLUMN = 26  # where what is said of a flag or field begins


def text(doc: str, own: Iterable[flags.Flag], base: ModuleType | None) -> str:
  """The whole page, as wide as the terminal but at most 100 columns.

  `base` is configs/base.py, for a command that takes a config.
  """
  width = min(100, shutil.get_terminal_size((100, 24)).columns) - 1
  lines = [doc.strip(), '', 'Flags:']
  for flag in own:
    default = f' [{flag.default}]' if flag.default not in (None, '', False, []) else ''
    what = flag.help.partition(';\n')[0]  # absl adds what a flag means that is given again
    lines += _entry(f'--{flag.name}', what + default, width, most=3)
  if base is not None:
    lines += ['', 'Fields of the config, set by --config.FIELD=VALUE (configs/base.py has more):']
    told = comments(Path(str(base.__file__)).read_text(encoding='utf-8'))
    values = flatten(base.get_config())
    for name in sorted(values, key=list(told).index):  # as they stand there
      lines += _entry(f'{name}={values[name]}', told[name], width, most=1)
  return '\n'.join([*lines, '', "--helpfull shows the libraries' flags too."])


def comments(source: str) -> dict[str, str]:
  """What the comments of configs/base.py say: {dotted field: one sentence}.

  That behind a field is its own. One above it is, too, where none stands behind: else a heading.
  """
  found: dict[str, str] = {}
  above: list[str] = []
  group = ''
  for line in source.splitlines():
    if block := re.match(r' +# (.*)', line):
      above.append(block[1])
      continue
    if opened := re.match(r" +'(\w+)': \{", line):
      group = f'{opened[1]}.'
      inside = [f'{group}{name}' for name in re.findall(r"'(\w+)':", line.partition('{')[2])]
      if inside:  # all on one line: the comment is the first's
        found |= {**dict.fromkeys(inside, ''), inside[0]: _first_sentence(' '.join(above))}
        group = ''
    elif a_field := re.match(r" +'(\w+)': .*?,(?:  # (.*))?$", line):
      found[group + a_field[1]] = a_field[2] or _first_sentence(' '.join(above))
    elif line.strip() == '},':
      group = ''
    above = []
  return found


def _first_sentence(block: str) -> str:
  return re.split(r'(?<=[a-z)])\. ', block)[0].rstrip('.')


def _entry(name: str, what: str, width: int, most: int) -> list[str]:
  """A name and what is said of it, on at most so many lines."""
  indent = max(COLUMN, len(name) + 4)
  lines = textwrap.wrap(what, width - indent, break_long_words=False) or ['']
  if len(lines) > most:
    lines = textwrap.wrap(what, width - indent - 2, break_long_words=False)[:most]
    lines[-1] += ' …'
  first = f'  {name}'.ljust(indent) + lines[0]
  return [first.rstrip(), *(' ' * indent + line for line in lines[1:])]
