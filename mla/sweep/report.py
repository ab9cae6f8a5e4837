"""A sweep's report: verdict, warnings, how it is judged; for the terminal and as report.md.

Its tables are made in sections.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla import files, plots, terminal
from mla.sweep import frontier, looks, sections
from mla.tables import Table, columns, markdown

TRAINING_LENGTH = ('num_steps', 'batch_size')  # fields that say how many tokens an arm has seen


def write(folder: Path, reference: str = '', margin: float = frontier.MARGIN) -> str:
  """frontier.json, frontier.png and report.md of a sweep; returns the table for the terminal.

  If the results are new, this is a look at them, which is recorded first (mla/sweep/looks.py).
  """
  summary = frontier.summarise(folder, reference, margin)
  looks.record(folder, summary['looks'])
  frontier.write_json(summary, folder / 'frontier.json')
  plots.save(plots.frontier, folder / 'frontier.png', summary)
  files.write_whole(folder / 'report.md', written(summary))
  shown = [frontier_table(summary)]
  if 'probe' in summary:
    table = sections.recall_table(summary)
    shown.append(columns([table.heads, *table.rows], words={0}, width=terminal.width()))
  told = [verdict(summary), *warnings(summary), f'written: {folder / "report.md"}']
  return '\n'.join([*shown, *map(terminal.fit, told)])


def frontier_table(summary: Mapping[str, Any]) -> str:
  """A line an arm, by cache bytes, for the terminal: what its columns are stands below."""
  heads, rows = sections.frontier_rows(summary)
  short = [head.split(' (')[0] for head in heads]
  return columns([short, *rows], words={0, 9}, width=terminal.width()) + terminal.fit(
    '\n+/-, d and text +/-: two-sided 95 %. d at most: one-sided 95 %, simultaneous over arms and '
    'looks.'
  )


def written(summary: Mapping[str, Any]) -> str:
  """report.md."""
  first, *others = sections.tables(summary)
  parts = [
    '# Sweep report',
    about(summary),
    verdict(summary),
    '\n'.join(f'- {warning}' for warning in warnings(summary)),
    '![frontier](frontier.png)',
    *_section(first),
    _starred(summary),
    '*+/-* is the arm by itself, *d* the pair by itself, both two-sided. *d at most* is one-sided, '
    'and the whole column holds with 95 % confidence. *text* is 1.96 standard errors of *d* over '
    'evaluation windows: what another text would move, which more seeds do not lessen.',
    '## How it is judged',
    *_rules(summary),
    *(part for table in others for part in _section(table)),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _section(table: Table) -> list[str]:
  return [f'## {table.title}', table.note, markdown(table.heads, table.rows) if table.rows else '']


def about(summary: Mapping[str, Any]) -> str:
  """What the losses of a report are of."""
  return (
    f'Loss is in nats a token, read through a {summary["cache_dtype"]} cache on '
    f'{summary["tokens_evaluated"]:,} validation targets, the same for every trial unless a '
    'warning says otherwise. *d* is the difference from the reference '
    f'`{summary["reference"]}`.'
  )


def _rules(summary: Mapping[str, Any]) -> list[str]:
  """How the figures came about, with those of this sweep."""
  tuned = sorted({a['tuning_seed'] for a in summary['arms'] if a['tuning_seed'] is not None})
  found = []
  if tuned:
    found.append(
      "An arm's learning rate is the best with its tuning seed "
      f'({", ".join(map(str, tuned))}), which then does not count: losses are means over the other '
      'seeds (mla/sweep/tuning.py).'
    )
  correlation = summary['correlation']
  nested = any('prefix_of' in arm for arm in summary['arms'])
  but = ' (but for widths of one nested run)' if nested else ''
  found.append(
    f'Differences are of independent samples (Welch), not paired by seed{but}: '
    + (
      'too few seeds are common to the arms to measure how much luck they share.'
      if correlation is None
      else f'the mean correlation of two arms over seeds is {correlation["mean"]:.2f} '
      f'({correlation["pairs"]} pairs, {correlation["seeds"]} seeds). Were it high, the intervals '
      'would be too wide (mla/sweep/statistics.py).'
    )
  )
  counts = ', '.join(str(len(look['seeds'])) for look in summary['looks'])
  found.append(
    f'This is look {summary["look"]} at the sweep (so far after {counts} seeds). It may '
    f'err with {summary["look_level"]:.4g}, so that all looks together err with at most '
    f'{looks.TOTAL} (mla/sweep/looks.py). What is called simultaneous shares that in equal parts '
    '(Bonferroni): the bounds against the reference, the verdicts on the frontier, the pairs of '
    'equal bytes, and the steps of the latent, each of the four by itself. Only reports count as '
    'looks: who has seen losses elsewhere (logs, TensorBoard, results.jsonl, a copy) and then '
    'decided which arms to keep or when to stop has looked too, and no figure here allows for it.'
  )
  return found


def _starred(summary: Mapping[str, Any]) -> str:
  if not any(arm['failed_seeds'] or arm['tuned_on_itself'] for arm in summary['arms']):
    return ''
  return (
    '\\* no fair mean: over the seeds that finished where others failed, or the loss that chose '
    'the learning rate where no other seed finished.'
  )


def verdict(summary: Mapping[str, Any]) -> str:
  """The sweet spot in words, or that the data cannot tell."""
  arms = {arm['arm']: arm for arm in summary['arms']}
  reference, margin = summary['reference'], summary['margin']
  spot, undecided = summary['sweet_spot']['arm'], summary['sweet_spot']['undecided']
  most = arms[reference]['kv_cache_bytes_per_token']
  if arms[reference]['failed_seeds']:
    return (
      f'Sweet spot: none, for seeds of the reference {reference} failed, and there is no loss to '
      'keep within a margin of.'
    )
  if spot is None:
    text = (
      'Sweet spot: the data cannot tell whether any smaller cache is within '
      f'{margin} nats of {reference}.'
    )
  elif spot == reference:
    text = f'Sweet spot: no smaller cache is within {margin} nats of {reference}.'
  else:
    size = arms[spot]['kv_cache_bytes_per_token']
    bound = arms[spot]['difference']['one_sided_upper_95_simultaneous']
    text = (
      f'Sweet spot: {spot}, {size:,.0f} bytes a token ({most / size:.1f} times less than '
      f'{reference}), is the smallest cache shown to be within {margin} nats of {reference}: it '
      f'loses at most {bound:.4f} (one-sided 95 %, simultaneous over arms and looks).'
    )
  if undecided:
    seeds = summary['sweet_spot']['seeds_in_all']
    named = ', '.join(f'{arm} ({seeds[arm] or "no number"})' for arm in undecided)
    text += (
      ' Undecided among smaller caches, and how many judging seeds in all would tell on which side '
      f'of the margin each lies, if its mean and spread stay: {named}.'
    )
  return text


def warnings(summary: Mapping[str, Any]) -> list[str]:
  """What a reader must know before believing the table."""
  found = [f'failed: {failed["trial"]}: {failed["error"]}' for failed in summary['failed']]
  found += [f'{arm}: none of its trials finished' for arm in summary['failed_arms']]
  for arm in summary['arms']:
    name, tried = arm['arm'], arm['learning_rates_tried']
    if 'joined' in arm:
      found.append(f'{name}: the sweep did not train it; how it was trained is not compared')
    elif arm['learning_rate_at_edge']:
      found.append(
        f'{name}: its best learning rate, {arm["learning_rate"]:g}, is an edge of those tried'
      )
    elif len(tried) < 3:
      found.append(
        f'{name}: {len(tried)} learning rate{"s"[: len(tried) - 1]} tried; three or more make it '
        'fair'
      )
    if arm['failed_seeds']:
      found.append(
        f'{name}: {sections.finished(arm)} seeds finished; an arm that fails is neither on the '
        'frontier nor the sweet spot'
      )
    if arm['tuned_on_itself']:
      found.append(
        f'{name}: tuned on itself: only the seed that chose its learning rate finished, so '
        'its loss is too good and nothing is decided by it'
      )
    elif arm['half_width'] is None:
      found.append(f'{name}: one seed, so no interval')
    if 'costs_unknown' in arm and 'joined' not in arm:
      found.append(f'{name}: what its training costs is not known ({arm["costs_unknown"]})')
  two = [arm['arm'] for arm in summary['arms'] if arm['seeds'] == 2]
  if two:
    found.append(
      'an interval over two seeds rests on a single difference, and is wide or narrow by chance: '
      + ', '.join(two)
    )
  for name, values in summary['unlike_settings'].items():
    told = ', '.join(map(str, values))
    found.append(f'{name} differs between trials that no arm sets it for: {told}')
  swept = {name for arm in summary['arms'] for name in arm['fields'] if _moves_targets(name)}
  for name in sorted(swept):
    if len({str(arm['fields'].get(name)) for arm in summary['arms']}) > 1:
      of_text = any(arm['mean_bits_per_byte'] is not None for arm in summary['arms'])
      cure = 'compare bits per byte' if of_text else 'their losses cannot be compared'
      found.append(f'{name} differs between arms, and with it what is scored: {cure}')
  for name in TRAINING_LENGTH:
    set_by = {arm.get('prefix_of', arm['arm']): arm['fields'].get(name) for arm in summary['arms']}
    if len(set(map(str, set_by.values()))) > 1:
      told = ', '.join(f'{arm} {value}' for arm, value in set_by.items() if value is not None)
      found.append(
        f'{name} differs between arms ({told}): who has seen more tokens has a lower loss with any '
        'cache'
      )
  wide = [
    f'{arm["arm"]} ({arm["half_width"]:.3f}; {arm["seeds_for_width"] or "very many"} seeds)'
    for arm in summary['arms']
    if arm['half_width'] is not None and arm['half_width'] > frontier.WIDTH
  ]
  if wide:
    found.append(
      f'two-sided 95 % half-widths above {frontier.WIDTH} nats, because the seeds spread that far, '
      f'and how many seeds of such a spread would bring them there: {", ".join(wide)}'
    )
  return found


def _moves_targets(field: str) -> bool:
  return field == 'seq_len' or field.startswith('data.')
