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
    'on each device', 'perplexity', '95 %', 'bits/byte', 'accuracy', '95 %', 'bits recalled',
    'tokens/GiB', 'users/GiB at 8k',
  )  # fmt: skip
  rows: list[tuple[str, ...]] = []
  shared = False  # by devices
  for run in sorted(runs, key=lambda run: run['kv_cache_bytes_per_token']):
    size = run['kv_cache_bytes_per_token']
    on_a_device = run.get('kv_cache_bytes_per_token_per_device', size)
    shared = shared or on_a_device < size
    bits = run['bits_per_byte']
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
      _interval(run['perplexity_ci95']),
      '-' if bits is None else f'{bits:.4f}',
      *_recall(run),
      f'{GIB / size:,.0f}',
      f'{GIB / size / CONTEXT:,.1f}',
    ))  # fmt: skip
  left_out = set() if shared else {7}
  left_out |= set() if any('accuracy' in run for run in runs) else {11, 12, 13}
  left_out |= set() if any(run['bits_per_byte'] is not None for run in runs) else {10}
  kept = [place for place in range(len(heads)) if place not in left_out]
  table = [[row[place] for place in kept] for row in (heads, *rows)]
  told = columns(table, words={0, 1, 5}, width=terminal.width())
  texts: dict[str, list[str]] = {}
  for run in runs:
    texts.setdefault(run.get('data_digest', ''), []).append(Path(run['workdir']).name)
  if len(texts) > 1:
    groups = ' | '.join(', '.join(dict.fromkeys(names)) for names in texts.values())
    told += '\n\n' + terminal.fit(
      f'not of one text and tokenizer: {groups}. Perplexity cannot be compared between these, and '
      'bits/byte only where they read the same validation text'
    )
  return told


def _interval(bounds: Sequence[float] | None) -> str:
  return f'{bounds[0]:.4f} to {bounds[1]:.4f}' if bounds else '-'


def _recall(run: Mapping[str, Any]) -> tuple[str, str, str]:
  """A probe's accuracy, its interval, and bits of those that a window holds."""
  if 'accuracy' not in run:
    return '-', '-', '-'
  bits = f'{run["bits_recalled"]:,.0f} of {run["bits_held"]:,.0f}'
  return f'{run["accuracy"]:.4f}', _interval(run['accuracy_ci95']), bits


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
