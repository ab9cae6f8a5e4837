"""Rows as text: aligned for a terminal, as Markdown; and eval.py's table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mla import terminal

GIB, MIB = 2**30, 2**20
CONTEXT = 8192  # tokens of a conversation, for users per GiB


class Table(NamedTuple):
  title: str
  note: str  # what must be known to read it
  heads: Sequence[str]
  rows: Sequence[Sequence[str]]  # the first cell of each says whose it is


def compare(runs: Sequence[Mapping[str, Any]]) -> str:
  """eval.py's table: a line a run, by cache bytes; and what the bytes mean."""
  heads = (
    'run', 'attention', 'latent', 'non-emb. params', 'step', 'cache', 'bytes/token',
    'on each device', 'perplexity', '95 %', 'bits/byte', 'tokens/GiB', 'users/GiB at 8k',
  )  # fmt: skip
  rows: list[tuple[str, ...]] = []
  shared = False  # by devices
  for run in sorted(runs, key=lambda run: run['kv_cache_bytes_per_token']):
    size = run['kv_cache_bytes_per_token']
    on_a_device = run.get('kv_cache_bytes_per_token_per_device', size)
    shared = shared or on_a_device < size
    interval = run['perplexity_ci95']
    rows.append((
      Path(run['workdir']).name,
      run['attention'],
      latent(run) or '-',
      f'{run["params_non_embedding"]:,}',
      str(run['step']),
      run['cache_dtype'],
      f'{size:,.0f}',
      f'{on_a_device:,.1f}',
      f'{run["perplexity"]:.4f}',
      f'{interval[0]:.4f} to {interval[1]:.4f}' if interval else '-',
      f'{run["bits_per_byte"]:.4f}',
      f'{GIB / size:,.0f}',
      f'{GIB / size / CONTEXT:,.1f}',
    ))  # fmt: skip
  table = [heads, *rows]
  if not shared:
    place = heads.index('on each device')
    table = [(*row[:place], *row[place + 1 :]) for row in table]
  return columns(table, words={0, 1, 5}, width=terminal.width())


def latent(run: Mapping[str, Any]) -> str:
  """The width of a run's latent, or those of its layers'; '' where there is none."""
  return ','.join(map(str, run.get('layer_dims') or [run['latent_dim'] or '']))


def columns(rows: Sequence[Sequence[str]], words: set[int], width: int | None = None) -> str:
  """Rows, heads first, as aligned text; columns in `words` to the left, numbers to the right.

  What is wider than `width` is folded: further columns stand below, behind the first one again.
  """
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  blocks = [[0]]
  for column in range(1, len(widths)):
    wide = sum(widths[other] + 2 for other in blocks[-1]) + widths[column]
    if width is not None and wide > width and len(blocks[-1]) > 1:
      blocks.append([0])
    blocks[-1].append(column)
  return '\n\n'.join(_block(rows, block, widths, words) for block in blocks)


def _block(
  rows: Sequence[Sequence[str]], block: Sequence[int], widths: Sequence[int], words: set[int]
) -> str:
  lines = [
    '  '.join(
      row[column].ljust(widths[column]) if column in words else row[column].rjust(widths[column])
      for column in block
    ).rstrip()
    for row in rows
  ]
  return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
