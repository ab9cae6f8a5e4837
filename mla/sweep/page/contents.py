"""What report.html shows: figures for plotly.js as plain data, all words and numbers as text."""

import html
import math
import re
import shlex
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla import config as config_lib
from mla import metrics
from mla.errors import UserError
from mla.plots import panels
from mla.plots.styles import BAND, GREY, PALE, Style, styles
from mla.sweep import frontier, report, sections
from mla.sweep.results import JOINED
from mla.tables import Table

SYMBOLS = {
  's': 'square', '^': 'triangle-up', 'v': 'triangle-down', 'o': 'circle', 'D': 'diamond',
  'P': 'cross', 'X': 'x', '*': 'star', 'h': 'hexagon', 'd': 'diamond-tall',
}  # fmt: skip
STEPS = 100  # of the margin slider at most
POINTS = 150  # of a training curve at most
HINT = (
  'Filled: on the frontier; open: perhaps; pale: not. Bars: two-sided 95 % over the seeds, the '
  'small dots. The grey band reaches a margin above the reference. Point at an arm for its '
  'figures; click it for its command and training curves below. Click a name in the legend to hide '
  'its arms, twice to see them alone; click the picture twice for all arms, also those far off.'
)
ASIDE = 0.008  # of the axis' width: how far right of its arm a seed stands
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
FAR = 3  # quartile distances above the upper quartile: out of the picture until one zooms out


def contents(
  folder: Path,
  summary: Mapping[str, Any],
  lines: Sequence[Mapping[str, Any]],
  defaults: Mapping[str, Any],
) -> dict[str, Any]:
  """The page's data, of a sweep in `folder`: frontier.json's summary and results.jsonl's lines.

  `defaults` are configs/base.py's fields, flat, on which commands build.
  """
  of_run: dict[str, list[Mapping[str, Any]]] = {}
  for line in lines:
    of_run.setdefault(line['arm'], []).append(line)
  # A prefix of a nested latent is read from the whole one's runs.
  of_arm = {arm['arm']: of_run.get(arm.get('prefix_of', arm['arm']), []) for arm in summary['arms']}
  training = {arm['arm']: _training(arm, of_arm[arm['arm']], defaults) for arm in summary['arms']}
  hovers = {arm['arm']: _hover(arm, summary, training[arm['arm']]) for arm in summary['arms']}
  traces, places = _traces(summary, hovers)
  margins = margin_grid(summary)
  spots = [_spot(summary, margin, places) for margin in margins]
  return {
    'about': report.about(summary).replace('*', '').replace('`', ''),
    'hint': HINT,
    'warnings': report.warnings(summary),
    'spots': spots,
    'start': margins.index(summary['margin']),
    'chosen': summary['sweet_spot']['arm'] or summary['reference'],
    'traces': traces,
    'ring': len(traces) - 1,
    'layout': _layout(summary),
    # The legend at the right: it may be long, and above it lies what plotly offers to do.
    'curves_layout': {**_plain('step', 'loss, nats per token'), 'legend': {}},
    'arms': [
      {
        'arm': arm['arm'],
        'figures': '; '.join(figures(arm, summary)) + '.',
        **training[arm['arm']],
        'curves': _curves(arm, of_arm[arm['arm']], folder / 'trials'),
      }
      for arm in summary['arms']
    ],
    'tables': [_table(table, of_arm) for table in sections.tables(summary)],
  }


def margin_grid(summary: Mapping[str, Any]) -> list[float]:
  """Margins from 0 to where the smallest cache is within, or twice the report's, which is one."""
  bounds = [
    (arm['difference'] or {}).get('one_sided_upper_95_simultaneous') for arm in summary['arms']
  ]
  smallest = next((bound for bound in bounds if bound is not None), 0.0)
  top = max(2 * summary['margin'], 1.1 * smallest, 0.01)
  unit = 10.0 ** math.floor(math.log10(top / STEPS))
  step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * STEPS >= top)
  grid = {round(count * step, 12) for count in range(math.ceil(top / step) + 1)}
  return sorted(grid | {summary['margin']})


def figures(arm: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
  """An arm's figures in words, a line each."""
  seeds, tried = ', '.join(arm['losses']), arm['learning_rates_tried']
  loss = f'loss {arm["mean_loss"]:.4f}'
  if arm['ci95']:
    low, high = arm['ci95']
    loss += f' ({low:.4f} to {high:.4f}, two-sided 95 % over {arm["seeds"]} seeds: {seeds})'
  else:
    loss += f' (seed {seeds}, so no interval)'
  told = [
    loss,
    f'{arm["kv_cache_bytes_per_token"]:,.0f} bytes a token ({summary["cache_dtype"]})',
    f'learning rate {arm["learning_rate"]:g}'
    + (f' of {", ".join(f"{rate:g}" for rate in tried)}' if len(tried) > 1 else '')
    + (f', chosen by seed {arm["tuning_seed"]}' if arm['tuning_seed'] is not None else ''),
    f'{arm["params_non_embedding"]:,} non-embedding parameters',
    f'on the frontier: {arm["on_frontier"]}',
  ]
  d = arm['difference']
  if d and d['one_sided_upper_95_simultaneous'] is not None:
    told.append(
      f'{d["mean"]:+.4f} against {summary["reference"]}, at most '
      f'{d["one_sided_upper_95_simultaneous"]:+.4f} (one-sided 95 %, simultaneous)'
    )
  if arm['failed_seeds']:
    told.append(f'seeds {", ".join(map(str, arm["failed_seeds"]))} failed: no fair mean')
  if arm['tuned_on_itself']:
    told.append('the seed that chose its learning rate is its only one: no fair mean')
  return told


def command(line: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
  """What trains a trial again, word for word, from its line in results.jsonl.

  Lines of before sweeps wrote down what their trials have in common lack that; then a CONFIG stands
  where the sweep's own --config, and --config.FIELD=VALUE, belong.
  """
  own = {**line['fields'], 'learning_rate': line['learning_rate'], 'seed': line['seed']}
  config = 'configs/base.py'
  if 'settings' in line:
    fields = {**config_lib.ADDED, **line['settings'], **own}
    own = {name: value for name, value in fields.items() if value != defaults.get(name)}
  else:
    config = 'CONFIG'
  flags = [f'--config.{name}={value}' for name, value in own.items()]
  workdir = f'--workdir=runs/{line["trial"]}'
  return [*map(shlex.quote, ('python', 'train.py', f'--config={config}', *flags, workdir))]


def _training(
  arm: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """The command for an arm's first seed that counts, and what to change for the others."""
  used = [line for line in lines if _counts(line, arm)]
  if not used:
    return {'command': [], 'remark': 'Of its trials no line is here.'}
  first, *others = sorted(used, key=lambda line: line['seed'])
  if first.get(JOINED):
    return {'command': [], 'remark': 'The sweep did not train it.'}
  remark = ''
  if others:
    seeds = ', '.join(str(line['seed']) for line in others)
    remark = f'The other seeds that judge it: {seeds}; give each another workdir. '
  if 'settings' not in first:
    remark += (
      "These results don't say what the sweep's --config was: put it for CONFIG, and behind "
    )
    remark += 'it what --config.FIELD=VALUE the sweep was given.'
  return {'command': command(first, defaults), 'remark': remark}


def _counts(line: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
  same_rate = line['learning_rate'] == arm['learning_rate']
  return line['status'] == 'done' and same_rate and str(line['seed']) in arm['losses']


def _traces(
  summary: Mapping[str, Any], hovers: Mapping[str, str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
  """Two traces a family (arms; their seeds), the line of lowest means, and last the sweet spot's.

  Also where each arm stands: arms of equal bytes stand side by side.
  """
  arms = summary['arms']
  sizes = [arm['kv_cache_bytes_per_token'] for arm in arms]
  low, high = panels.log_limits(sizes)
  spots = panels.side_by_side(sizes, (low, high))
  aside = (high / low) ** ASIDE
  places = {arm['arm']: float(x) for arm, x in zip(arms, spots, strict=True)}
  family = styles(arm['attention'] for arm in arms)
  traces = []
  for variant, look in family.items():
    ours = [arm for arm in arms if arm['attention'] == variant]
    traces += [_arms_trace(ours, places, look, hovers), _seeds_trace(ours, places, aside, look)]
  best: list[Mapping[str, Any]] = []
  for arm in arms:
    fair = not (arm['failed_seeds'] or arm['tuned_on_itself'])
    if fair and (not best or arm['mean_loss'] < best[-1]['mean_loss']):
      best.append(arm)
  line = {'shape': 'hv', 'color': PALE, 'width': 1.5}
  traces.append({
    'type': 'scatter', 'mode': 'lines', 'name': 'lowest mean so far', 'hoverinfo': 'skip',
    'x': [places[arm['arm']] for arm in best], 'y': [arm['mean_loss'] for arm in best],
    'line': line,
  })  # fmt: skip
  traces.append({
    'type': 'scatter', 'mode': 'markers', 'name': 'sweet spot', 'hoverinfo': 'skip',
    'x': [], 'y': [],
    'marker': {'symbol': 'circle-open', 'size': 24, 'color': '#B8860B', 'line': {'width': 2.5}},
  })  # fmt: skip
  return traces, places


def _arms_trace(
  arms: Sequence[Mapping[str, Any]],
  places: Mapping[str, float],
  look: Style,
  hovers: Mapping[str, str],
) -> dict[str, Any]:
  symbol = SYMBOLS.get(look.marker, 'circle')
  faces = ['' if arm['on_frontier'] == 'yes' else '-open' for arm in arms]
  return {
    'type': 'scatter', 'mode': 'markers', 'name': look.label,
    'legendgroup': arms[0]['attention'],
    'x': [places[arm['arm']] for arm in arms],
    'y': [arm['mean_loss'] for arm in arms],
    'error_y': {
      'type': 'data', 'array': [arm['half_width'] or 0 for arm in arms], 'color': look.colour,
      'thickness': 1.3, 'width': 4,
    },
    'marker': {
      'symbol': [symbol + face for face in faces], 'size': 11, 'color': look.colour,
      'opacity': [0.45 if arm['on_frontier'] == 'no' else 1 for arm in arms],
    },
    'customdata': [arm['arm'] for arm in arms],
    'text': [hovers[arm['arm']] for arm in arms],
    'hovertemplate': '%{text}<extra></extra>',
  }  # fmt: skip


def _seeds_trace(
  arms: Sequence[Mapping[str, Any]], places: Mapping[str, float], aside: float, look: Style
) -> dict[str, Any]:
  seeds = [(arm, seed, loss) for arm in arms for seed, loss in arm['losses'].items()]
  return {
    'type': 'scatter', 'mode': 'markers', 'legendgroup': arms[0]['attention'],
    'showlegend': False, 'name': f'{look.label}, seeds',
    'x': [places[arm['arm']] * aside for arm, _, _ in seeds],
    'y': [loss for _, _, loss in seeds],
    'marker': {'symbol': 'circle', 'size': 5, 'color': look.colour, 'opacity': 0.35},
    'customdata': [arm['arm'] for arm, _, _ in seeds],
    'text': [f'{_escaped(arm["arm"])}, seed {seed}: {loss:.4f}' for arm, seed, loss in seeds],
    'hovertemplate': '%{text}<extra></extra>',
  }  # fmt: skip


def _hover(arm: Mapping[str, Any], summary: Mapping[str, Any], training: Mapping[str, Any]) -> str:
  """What stands beside the pointer, in plotly's markup: names are escaped."""
  lines = [*figures(arm, summary), ' '.join(training['command'])]
  told = [part for line in lines for part in textwrap.wrap(line, 76, break_on_hyphens=False)]
  return '<br>'.join([f'<b>{_escaped(arm["arm"])}</b>', *map(_escaped, told)])


def _escaped(text: str) -> str:
  return html.escape(text, quote=False)  # plotly's own markup knows no name for a quote


def _spot(summary: Mapping[str, Any], margin: float, places: Mapping[str, float]) -> dict[str, Any]:
  """The sweet spot at a margin, in words and as the ring in the picture."""
  spot = frontier.sweet_spot_at(summary, margin)
  losses = {arm['arm']: arm['mean_loss'] for arm in summary['arms']}
  there = [spot['arm']] if spot['arm'] else []
  return {
    'margin': margin,
    'margin_text': f'{margin:g}',
    'arm': spot['arm'],
    'verdict': report.verdict({**summary, 'margin': margin, 'sweet_spot': spot}),
    'band': losses[summary['reference']] + margin,
    'ring': {'x': [places[arm] for arm in there], 'y': [losses[arm] for arm in there]},
  }


def _layout(summary: Mapping[str, Any]) -> dict[str, Any]:
  arms = summary['arms']
  sizes = sorted({arm['kv_cache_bytes_per_token'] for arm in arms})
  base = next(arm['mean_loss'] for arm in arms if arm['arm'] == summary['reference'])
  layout = _plain('KV cache, bytes per token (log scale)', 'validation loss, nats per token')
  low, high = panels.log_limits(sizes)
  shown = _apart(sizes, math.log(high / low))
  layout['xaxis'] |= {
    'type': 'log', 'range': [math.log10(low), math.log10(high)],
    'tickvals': shown, 'ticktext': [f'{size:,.0f}' for size in shown],
  }  # fmt: skip
  layout['yaxis']['range'] = _crowd(arms, base + summary['margin'])
  layout['shapes'] = [
    {
      'type': 'rect', 'xref': 'paper', 'x0': 0, 'x1': 1, 'y0': base, 'y1': base + summary['margin'],
      'fillcolor': BAND, 'line': {'width': 0}, 'layer': 'below',
    }
  ]  # fmt: skip
  return layout


def _plain(x: str, y: str) -> dict[str, Any]:
  axis = {'gridcolor': '#e5e5e5', 'zeroline': False, 'linecolor': GREY}
  return {
    'xaxis': {**axis, 'title': {'text': x}},
    'yaxis': {**axis, 'title': {'text': y}},
    'plot_bgcolor': 'white',
    'hovermode': 'closest',
    'hoverlabel': {'align': 'left', 'bgcolor': 'white', 'namelength': -1},
    'legend': {'orientation': 'h', 'y': 1.02, 'yanchor': 'bottom'},
    'margin': {'l': 70, 'r': 20, 't': 50, 'b': 60},
  }


def _apart(sizes: Sequence[float], width: float) -> list[float]:
  """The sizes that get a tick: the ends, and others from the right that don't touch."""
  shown = [sizes[-1]]
  for size in [sizes[0], *reversed(sizes[1:-1])]:
    if all(abs(math.log(size / other)) > 0.06 * width for other in shown):
      shown.append(size)
  return sorted(shown)


def _crowd(arms: Sequence[Mapping[str, Any]], band: float) -> list[float]:
  """From the lowest loss to the highest that does not lie far above most, with intervals."""
  losses = [arm['mean_loss'] for arm in arms]
  limit = math.inf
  if len(losses) > 3:
    lower, _, upper = statistics.quantiles(losses)
    limit = upper + FAR * (upper - lower)
  near = [arm for arm in arms if arm['mean_loss'] <= limit]
  lows = [min(*arm['losses'].values(), arm['mean_loss'] - (arm['half_width'] or 0)) for arm in near]
  highs = [arm['mean_loss'] + (arm['half_width'] or 0) for arm in near]
  low, high = min(lows), max(*highs, band)
  pad = 0.06 * (high - low) or 0.01
  return [low - pad, high + pad]


def _curves(
  arm: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], trials: Path
) -> list[dict[str, Any]]:
  """Training and evaluation losses of an arm's trials, those that judge it first."""
  found, trials_shown = [], 0
  for line in sorted(lines, key=lambda line: (not _counts(line, arm), line['seed'])):
    try:
      logged = metrics.read(trials / line['trial'] / 'metrics.jsonl')
    except (OSError, UserError):  # its folder has gone, or is damaged: the page is of the results
      continue
    counts, colour = _counts(line, arm), COLOURS[trials_shown % len(COLOURS)]
    trials_shown += 1
    name = f'seed {line["seed"]}' + (
      f', rate {line["learning_rate"]:g}' if len(arm['learning_rates_tried']) > 1 else ''
    )
    for key, dash, told in (('loss', 'dot', 'training'), ('eval_loss', 'solid', 'validation')):
      points = _thinned([(entry['step'], entry[key]) for entry in logged if key in entry])
      if points:
        found.append({
          'type': 'scatter', 'mode': 'lines+markers' if key == 'eval_loss' else 'lines',
          'name': f'{name}, {told}', 'legendgroup': name,
          'visible': True if counts else 'legendonly',
          'x': [step for step, _ in points], 'y': [loss for _, loss in points],
          'line': {'dash': dash, 'width': 1.3, 'color': colour},
        })  # fmt: skip
  return found


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """At most POINTS of them, the last among them, losses to five digits."""
  stride = math.ceil(len(points) / POINTS)
  kept = list(reversed(points))[::stride][::-1] if stride > 1 else points
  return [(step, float(f'{loss:.5g}')) for step, loss in kept]


def _table(table: Table, arms: Mapping[str, Any]) -> dict[str, Any]:
  """Cells as they stand in report.md, each with what it is sorted by."""
  return {
    'title': table.title,
    'note': re.sub('[*`]', '', table.note),
    'heads': list(table.heads),
    'rows': [
      {
        'arm': next((cell for cell in row if cell in arms), ''),
        'cells': list(row),
        'values': [_value(cell) for cell in row],
      }
      for row in table.rows
    ],
  }


def _value(cell: str) -> float | str | None:
  """A number for a cell that begins with one, None for one that says there is none, else text."""
  number = re.match(r'[+-]?[\d,]*\.?\d+', cell)
  if number:
    return float(number[0].replace(',', ''))
  return None if cell == '-' else cell
