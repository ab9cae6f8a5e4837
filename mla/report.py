"""Tables and the written report, from results on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla import frontier, plots

GIB, MIB = 2**30, 2**20
CONTEXT = 8192  # tokens of a conversation, for users per GiB


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """eval.py's: one line a run, by cache bytes; and what the bytes mean."""
  heads = (
    'run', 'attention', 'latent', 'params', 'step', 'cache', 'bytes/token', 'perplexity', '95 %',
    'bits/byte', 'tokens/GiB', 'users/GiB at 8k',
  )  # fmt: skip
  rows = []
  for run in sorted(runs, key=lambda run: run['kv_cache_bytes_per_token']):
    size = run['kv_cache_bytes_per_token']
    interval = run['perplexity_ci95']
    rows.append((
      Path(run['workdir']).name,
      run['attention'],
      str(run['latent_dim'] or '-'),
      f'{run["params_non_embedding"]:,}',
      str(run['step']),
      run['cache_dtype'],
      f'{size:,.0f}',
      f'{run["perplexity"]:.4f}',
      f'{interval[0]:.4f} to {interval[1]:.4f}' if interval else '-',
      f'{run["bits_per_byte"]:.4f}',
      f'{GIB / size:,.0f}',
      f'{GIB / size / CONTEXT:,.1f}',
    ))  # fmt: skip
  return columns([heads, *rows], words={0, 1, 5})


def columns(rows: Sequence[Sequence[str]], words: set[int]) -> str:
  """Rows, heads first, as aligned text; columns in `words` to the left, numbers to the right."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    '  '.join(
      cell.ljust(width) if column in words else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def write(folder: Path, reference: str = '', margin: float = frontier.MARGIN) -> str:
  """frontier.json, frontier.png and report.md of a sweep; returns the table for the terminal."""
  summary = frontier.summarise(folder, reference, margin)
  frontier.write_json(summary, folder / 'frontier.json')
  plots.save(plots.frontier, folder / 'frontier.png', summary)
  (folder / 'report.md').write_text(written(summary))
  told = [verdict(summary), *warnings(summary), f'written: {folder / "report.md"}']
  return '\n'.join([frontier_table(summary), *told])


def frontier_table(summary: Mapping[str, Any]) -> str:
  """A line an arm, by cache bytes, for the terminal."""
  heads, rows = _frontier_rows(summary)
  return columns([heads, *rows], words={0, 8})


def written(summary: Mapping[str, Any]) -> str:
  """report.md."""
  parts = [
    '# Sweep report',
    f'Loss is in nats a token, read through a {summary["cache_dtype"]} cache on '
    f'{summary["tokens_evaluated"]:,} validation targets, the same for every trial unless a '
    "warning says otherwise. Intervals are Student's t, 95 %, over seeds. *d* is the difference "
    f'from the reference `{summary["reference"]}`, paired by seed.',
    verdict(summary),
    '\n'.join(f'- {warning}' for warning in warnings(summary)),
    '![frontier](frontier.png)',
    '## The frontier',
    'On it: no arm of as few bytes has a lower loss. *uncertain*: some pair cannot be told apart. '
    'The confidence is 95 % for each pair, not for all pairs together. The seed on which learning '
    'rates were compared counts like the others, so its loss is a little too good.',
    markdown(*_frontier_rows(summary)),
    '*text* is 1.96 standard errors of *d* over evaluation windows: what another text would move, '
    'which more seeds do not lessen.',
    '## At equal bytes',
    _equal_bytes(summary),
    '## latent_dim as the knob',
    _latents(summary),
    '## Training compute',
    "FLOPs a token: XLA's count of the compiled training step (mla/cost.py), attention as a whole "
    'square. Tokens a second: median of the log lines, on whatever machine the sweep ran, beside '
    'whatever else it ran; for a speed ratio measured side by side see bench/.',
    _compute(summary),
    '## Training memory',
    'Peak: arguments and working memory of the compiled step. Activations: what the forward pass '
    'keeps for the backward pass. With `remat=latents` only what the cache would keep is kept.',
    _training_memory(summary),
    '## Inference memory',
    f'Bytes of a {summary["cache_dtype"]} cache; users are conversations of {CONTEXT:,} tokens.',
    _inference_memory(summary),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def verdict(summary: Mapping[str, Any]) -> str:
  """The sweet spot in words, or that the data cannot tell."""
  arms = {arm['arm']: arm for arm in summary['arms']}
  reference, margin = summary['reference'], summary['margin']
  spot, undecided = summary['sweet_spot']['arm'], summary['sweet_spot']['undecided']
  most = arms[reference]['kv_cache_bytes_per_token']
  if spot is None:
    text = (
      'Sweet spot: the data cannot tell whether any smaller cache is within '
      f'{margin} nats of {reference}.'
    )
  elif spot == reference:
    text = f'Sweet spot: no smaller cache is within {margin} nats of {reference}.'
  else:
    size = arms[spot]['kv_cache_bytes_per_token']
    bound = arms[spot]['difference']['upper_bound_95']
    text = (
      f'Sweet spot: {spot}, {size:,.0f} bytes a token ({most / size:.1f} times less than '
      f'{reference}), is the smallest cache within {margin} nats of {reference} with 95 % '
      f'confidence (it loses at most {bound:.4f}).'
    )
  if undecided:
    seeds = summary['sweet_spot']['seeds_in_all']
    named = ', '.join(f'{arm} ({seeds[arm] or "no number"})' for arm in undecided)
    text += (
      ' Undecided among smaller caches, and how many seeds in all would tell on which side of the '
      f'margin each lies, if its mean and spread stay: {named}.'
    )
  return text


def warnings(summary: Mapping[str, Any]) -> list[str]:
  """What a reader must know before believing the table."""
  found = [f'failed: {failed["trial"]}: {failed["error"]}' for failed in summary['failed']]
  for arm in summary['arms']:
    tried = arm['learning_rates_tried']
    if arm['learning_rate_at_edge']:
      found.append(
        f'{arm["arm"]}: its best learning rate, {arm["learning_rate"]:g}, is an edge of those tried'
      )
    elif len(tried) < 3:
      found.append(f'{arm["arm"]}: {len(tried)} learning rate tried; three or more make it fair')
    if arm['half_width'] is None:
      found.append(f'{arm["arm"]}: one seed, so no interval')
    if 'costs_unknown' in arm:
      found.append(f'{arm["arm"]}: what its training costs is not known ({arm["costs_unknown"]})')
  for name, values in summary['unlike_settings'].items():
    told = ', '.join(map(str, values))
    found.append(f'{name} differs between trials that no arm sets it for: {told}')
  swept = {name for arm in summary['arms'] for name in arm['fields'] if _moves_targets(name)}
  for name in sorted(swept):
    if len({str(arm['fields'].get(name)) for arm in summary['arms']}) > 1:
      found.append(
        f'{name} differs between arms, and with it what is scored: compare bits per byte'
      )
  wide = [
    f'{arm["arm"]} ({arm["half_width"]:.3f}; {arm["seeds_for_width"] or "very many"} seeds)'
    for arm in summary['arms']
    if arm['half_width'] is not None and arm['half_width'] > frontier.WIDTH
  ]
  if wide:
    found.append(
      f'half-widths above {frontier.WIDTH} nats, because the seeds spread that far, and how many '
      f'seeds of such a spread would bring them there: {", ".join(wide)}'
    )
  return found


def _moves_targets(field: str) -> bool:
  return field == 'seq_len' or field.startswith('data.')


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _number(value: float | None, form: str = '.4f') -> str:
  return '-' if value is None else format(value, form)


def _ratio(value: float | None, unit: float | None) -> float | None:
  return None if value is None or unit is None else value / unit


def _difference(d: Mapping[str, Any] | None) -> str:
  if d is None:
    return '-'
  if d['ci95'] is None:
    return f'{d["mean"]:+.4f}'
  return f'{d["mean"]:+.4f} ({d["ci95"][0]:+.4f} to {d["ci95"][1]:+.4f})'


def _frontier_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  heads = 'arm, bytes/token, loss, 95 % +/-, seeds, learning rate, d (95 %), text +/-, on frontier'
  rows = [
    [
      arm['arm'],
      f'{arm["kv_cache_bytes_per_token"]:,.0f}',
      f'{arm["mean_loss"]:.4f}',
      _number(arm['half_width']),
      str(arm['seeds']),
      f'{arm["learning_rate"]:g}',
      _difference(arm['difference']),
      _number(arm['difference_windows_half_width']),
      arm['on_frontier'],
    ]
    for arm in summary['arms']
  ]
  return heads.split(', '), rows


def _equal_bytes(summary: Mapping[str, Any]) -> str:
  """Arms of the same bytes beside each other, the best first: fewer heads, or a latent?"""
  rows = []
  for size in sorted({arm['kv_cache_bytes_per_token'] for arm in summary['arms']}):
    group = [arm for arm in summary['arms'] if arm['kv_cache_bytes_per_token'] == size]
    for arm in group if len(group) > 1 else []:
      rows.append([
        f'{size:,.0f}',
        arm['arm'],
        f'{arm["mean_loss"]:.4f}',
        _number(arm['half_width']),
        _difference(arm['difference']),
        _difference(arm['difference_at_equal_bytes']),
      ])  # fmt: skip
  if not rows:
    return 'No two arms have the same bytes.'
  return markdown(
    ['bytes/token', 'arm', 'loss', '95 % +/-', 'd (95 %)', 'to the best here (95 %)'], rows
  )


def _latents(summary: Mapping[str, Any]) -> str:
  arms = [arm for arm in summary['arms'] if arm['latent_dim']]
  if len(arms) < 2:
    return 'Fewer than two latents in this sweep.'
  arms = sorted(arms, key=lambda arm: (arm['latent_dim'], arm['kv_cache_bytes_per_token']))
  rows = [
    [
      str(arm['latent_dim']),
      arm['arm'],
      f'{arm["kv_cache_bytes_per_token"]:,.0f}',
      f'{arm["mean_loss"]:.4f}',
      _difference(arm['difference']),
    ]
    for arm in arms
  ]
  return markdown(['latent_dim', 'arm', 'bytes/token', 'loss', 'd (95 %)'], rows)


def _compute(summary: Mapping[str, Any]) -> str:
  reference = next(arm for arm in summary['arms'] if arm['arm'] == summary['reference'])
  rows = [
    [
      arm['arm'],
      f'{arm["params_non_embedding"]:,}',
      _number(_ratio(arm['flops_per_token'], 1e6), '.2f'),
      _number(_ratio(arm['flops_per_token'], reference['flops_per_token']), '.3f'),
      _number(arm['tokens_per_second'], ',.0f'),
    ]
    for arm in summary['arms']
  ]
  heads = ['arm', 'params', 'MFLOPs/token', f'of {summary["reference"]}', 'tokens/s']
  return markdown(heads, rows)


def _training_memory(summary: Mapping[str, Any]) -> str:
  rows = [
    [
      arm['arm'],
      *(
        _number(arm['training_memory'] and arm['training_memory'][remat][what] / MIB, '.1f')
        for what in ('activation_bytes', 'peak_bytes')
        for remat in ('none', 'latents')
      ),
    ]
    for arm in summary['arms']
  ]
  heads = [
    'arm',
    'activations, MiB',
    'with remat=latents',
    'peak, MiB',
    'with remat=latents',
  ]
  return markdown(heads, rows)


def _inference_memory(summary: Mapping[str, Any]) -> str:
  rows = []
  for arm in summary['arms']:
    size = arm['kv_cache_bytes_per_token']
    rows.append([
      arm['arm'],
      f'{size:,.0f}',
      *(
        f'{batch * context * size / MIB:,.1f}'
        for batch, context in ((1, 1024), (1, CONTEXT), (32, CONTEXT))
      ),
      f'{GIB / (size * CONTEXT):,.0f}',
    ])  # fmt: skip
  heads = 'arm, bytes/token, MiB at 1 x 1k, at 1 x 8k, at 32 x 8k, users/GiB'.split(', ')
  return markdown(heads, rows)
