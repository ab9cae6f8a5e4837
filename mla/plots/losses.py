"""What a cache costs in loss: a sweep's frontier, latents and equals; eval.py's perplexities."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mla import tables
from mla.plots import labels, panels
from mla.plots.panels import Point
from mla.plots.styles import BAND, GREY, PALE, Number, names, one_line, share, spoken, styles

BYTES = 'KV cache, bytes per token'


def frontier(figure: Figure, summary: Mapping[str, Any]) -> None:
  """A sweep's arms: mean loss against cache bytes, 95 % over seeds, each seed; and the finding.

  Filled markers lie on the frontier with 95 % confidence, open ones may, pale ones do not. Arms of
  equal bytes stand side by side. The line goes through the arms that no smaller one beats in mean;
  an arm without a fair mean (starred: seeds failed) is passed by.
  """
  arms = summary['arms']
  sizes, points = [arm['kv_cache_bytes_per_token'] for arm in arms], [_point(arm) for arm in arms]
  of_name = {arm['arm']: arm for arm in arms}
  reference, spot = of_name[summary['reference']], of_name.get(summary['sweet_spot']['arm'])
  band = reference['mean_loss'], reference['mean_loss'] + summary['margin']
  limits = panels.log_limits(sizes)
  places = panels.side_by_side(sizes, limits)
  best: list[int] = []
  for index, point in enumerate(points):  # by bytes
    if _fair(arms[index]) and (not best or point.middle < points[best[-1]].middle):
      best.append(index)
  line = [(places[index], points[index].middle) for index in best]
  line += [(limits[1], height) for _, height in line[-1:]]
  panels.grow(figure, len(arms))
  rows = panels.make(figure, points, band)
  title, remark = _finding(summary, reference, spot)
  labels.headline(figure, title, remark)
  for axes in rows:
    panels.log_axis(axes, limits)
    axes.axhspan(*band, color=BAND, zorder=0, linewidth=0)
    axes.step(
      [x for x, _ in line], [y for _, y in line], where='post', color=PALE, linewidth=1.2, zorder=1
    )
  family = styles(arm['attention'] for arm in arms)
  for arm, x, point in zip(arms, places, points, strict=True):
    look, verdict = family[arm['attention']], arm['on_frontier']
    panels.draw(rows, x, point, look, hollow=verdict != 'yes', pale=verdict == 'no')
  keys: list[Artist] = [panels.key(look) for look in family.values()]
  keys += [
    Line2D([], [], color=PALE, linewidth=1.2, label='lowest mean so far'),
    panels.verdict_key('on the frontier'),
    panels.verdict_key('perhaps', hollow=True),
    panels.verdict_key('not', hollow=True, pale=True),
  ]
  if any(point.seeds for point in points):
    keys.append(Line2D([], [], linestyle='', marker='.', color=GREY, alpha=0.5, label='one seed'))
  whom = spoken(reference['arm']) if len(spoken(reference['arm'])) < 20 else 'the reference'
  keys.append(Patch(color=BAND, label=f'up to {summary["margin"]:g} nats above {whom}'))
  labels.legend(figure, keys, columns=max(len(family) + 1, 5))
  panels.axis_labels(figure, rows, f'{BYTES} (log scale)')
  labels.settle(figure)
  important = [arm['kv_cache_bytes_per_token'] for arm in (spot, reference) if arm]
  panels.log_ticks(rows[-1], sizes, [*important, *(sizes[index] for index in best)])
  steps = [corner for a, b in pairwise(line) for corner in (a, (b[0], a[1]))]
  colours = [family[arm['attention']].colour for arm in arms]
  panels.name(rows, points, places, _names(arms), colours, [steps + line[-1:]] if line else [])


def latent_knob(figure: Figure, summary: Mapping[str, Any]) -> None:
  """The arms with a latent: loss against latent_dim (log scale); the best others, as lines."""
  arms = [arm for arm in summary['arms'] if arm['latent_dim']]
  fair = [arm for arm in arms if _fair(arm)] or arms
  if not arms:
    return _nothing(figure, 'No arm of this sweep has a latent.')
  others: dict[str, Mapping[str, Any]] = {}
  for arm in sorted(summary['arms'], key=lambda arm: arm['mean_loss']):
    if not arm['latent_dim'] and _fair(arm):
      others.setdefault(arm['attention'], arm)
  widths, points = [arm['latent_dim'] for arm in arms], [_point(arm) for arm in arms]
  limits = panels.log_limits(widths)
  places = panels.side_by_side(widths, limits)
  family = styles(arm['attention'] for arm in summary['arms'])
  rows = panels.make(figure, points, *[(arm['mean_loss'],) * 2 for arm in others.values()])
  best = min(fair, key=lambda arm: arm['mean_loss'])
  told = ' Dashed: the best arm of each family without a latent.' if others else ''
  if any('prefix_of' in arm for arm in arms):
    told += ' Dotted: a nested run, cut to each width.'
  labels.headline(figure, _gains(fair), _bars_are(arms) + told)
  lines = []
  nested = {arm['prefix_of'] for arm in arms if 'prefix_of' in arm}  # each has a line of its own
  runs = [arm.get('prefix_of', arm['arm'] if arm['arm'] in nested else '') for arm in arms]
  for variant, run in sorted({(arm['attention'], of) for arm, of in zip(arms, runs, strict=True)}):
    lowest: dict[int, tuple[Number, Number]] = {}  # of each width
    dots = sorted(zip(arms, runs, places, strict=True), key=lambda dot: -dot[0]['mean_loss'])
    for arm, of, x in dots:
      if (arm['attention'], of) == (variant, run):
        lowest[arm['latent_dim']] = (x, arm['mean_loss'])
    lines.append([lowest[width] for width in sorted(lowest)])
    colour, dots_or_line = family[variant].colour, ':' if run else '-'
    for axes in rows:
      axes.plot(*zip(*lines[-1], strict=True), color=colour, linewidth=1.2, linestyle=dots_or_line)
  for arm, x, point in zip(arms, places, points, strict=True):
    panels.draw(rows, x, point, family[arm['attention']])
  ends: dict[Axes, list[tuple[Number, str, str]]] = {}
  shortened = names(arm['arm'] for arm in others.values())
  for arm in others.values():
    height, colour = arm['mean_loss'], family[arm['attention']].colour
    text = f'{shortened[arm["arm"]]}\n{arm["kv_cache_bytes_per_token"]:,.0f} bytes'
    axes = panels.panel_of(rows, height)
    axes.axhline(height, color=colour, linestyle='--', linewidth=1)
    ends.setdefault(axes, []).append((height, text, colour))
    lines.append([(limits[0], height), (limits[1], height)])
  for axes in rows:
    panels.log_axis(axes, limits)
  panels.axis_labels(figure, rows, 'width of the latent, C (log scale)')
  labels.room_at_the_right(figure, [text for group in ends.values() for _, text, _ in group])
  labels.settle(figure)
  panels.log_ticks(rows[-1], widths, [best['latent_dim']])
  for axes, group in ends.items():
    labels.beside(axes, *zip(*group, strict=True))
  texts = [f'{arm["kv_cache_bytes_per_token"]:,.0f} bytes{_star(arm)}' for arm in arms]
  if len({arm['attention'] for arm in arms}) > 1:
    texts = [f'{family[a["attention"]].label} {text}' for a, text in zip(arms, texts, strict=True)]
  if len(nested) > 1:
    texts = [f'{run}, {text}' if run else text for run, text in zip(runs, texts, strict=True)]
  colours = [family[arm['attention']].colour for arm in arms]
  panels.name(rows, points, places, texts, colours, lines)


def equal_bytes(figure: Figure, summary: Mapping[str, Any]) -> None:
  """Arms whose caches have the same bytes side by side, the best first; 95 % over seeds."""
  groups: dict[Number, list[Mapping[str, Any]]] = {}
  for arm in sorted(summary['arms'], key=lambda arm: (not _fair(arm), arm['mean_loss'])):
    groups.setdefault(arm['kv_cache_bytes_per_token'], []).append(arm)
  groups = {size: groups[size] for size in sorted(groups) if len(groups[size]) > 1}
  if not groups:
    return _nothing(figure, 'No two arms of this sweep have the same bytes.')
  arms = [arm for group in groups.values() for arm in group]
  points = [_point(arm) for arm in arms]
  places = [
    middle + 0.76 * ((index + 0.5) / len(group) - 0.5)
    for middle, group in enumerate(groups.values())
    for index in range(len(group))
  ]
  panels.grow(figure, len(arms))
  rows = panels.make(figure, points)
  title = 'At equal bytes: the lowest mean loss stands first in each group'
  if len(groups) <= 3:
    told = ', '.join(f'{spoken(group[0]["arm"])} at {size:,.0f}' for size, group in groups.items())
    title = f'At equal bytes, the lowest mean loss: {told} bytes'
  labels.headline(figure, title, _bars_are(arms))
  family = styles(arm['attention'] for arm in arms)
  for arm, x, point in zip(arms, places, points, strict=True):
    panels.draw(rows, x, point, family[arm['attention']])
  for axes in rows:
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(alpha=0.3, axis='y')
    for border in range(1, len(groups)):
      axes.axvline(border - 0.5, color=PALE, linewidth=0.6, alpha=0.5)
  panels.axis_labels(figure, rows, BYTES)
  labels.legend(figure, [panels.key(look) for look in family.values()], columns=6)
  labels.settle(figure)
  labels.ticks(rows[-1], range(len(groups)), [f'{size:,.0f}' for size in groups], [])
  colours = [family[arm['attention']].colour for arm in arms]
  panels.name(rows, points, places, _names(arms), colours)


def perplexity(figure: Figure, runs: Sequence[Mapping[str, Any]]) -> None:
  """eval.py's runs: perplexity against cache bytes per token, with the interval over windows.

  Accuracy where all of them are of probes. Runs of equal bytes stand side by side; a run of too few
  windows has no interval.
  """
  figure_of = 'accuracy' if all('accuracy' in run for run in runs) else 'perplexity'
  sizes, points = [run['kv_cache_bytes_per_token'] for run in runs], []
  for run in runs:
    middle = run[figure_of]
    low, high = run[f'{figure_of}_ci95'] or (middle, middle)
    # Where all windows are alike, rounding may put the interval beside its middle.
    points.append(Point(middle, min(low, middle), max(high, middle), ()))
  limits = panels.log_limits(sizes)
  places = panels.side_by_side(sizes, limits)
  family = styles(run['attention'] for run in runs)
  told = _run_names(runs)
  rows = panels.make(figure, points)
  dtypes = sorted({run['cache_dtype'] for run in runs})
  through = f'{" and ".join(dtypes)} cache' + ('s' if len(dtypes) > 1 else '')
  bars = 'Bars: two-sided 95 % over windows, not over seeds.'
  bars = (
    bars if any(run[f'{figure_of}_ci95'] for run in runs) else 'Too few windows for an interval.'
  )
  told_of = {'accuracy': 'share of answers that are right', 'perplexity': 'perplexity per token'}
  least = _least(sizes, points, told) if figure_of == 'perplexity' else ''
  title = least or f'{figure_of.capitalize()} through {through}'
  labels.headline(figure, title, f'One run each, {through}. {bars}')
  for run, x, point in zip(runs, places, points, strict=True):
    panels.draw(rows, x, point, family[run['attention']])
  for axes in rows:
    panels.log_axis(axes, limits)
  panels.axis_labels(figure, rows, f'{BYTES} (log scale)', told_of[figure_of])
  labels.legend(figure, [panels.key(look) for look in family.values()], columns=6)
  labels.settle(figure)
  panels.log_ticks(rows[-1], sizes, [max(sizes), min(sizes)])
  panels.name(rows, points, places, told, [family[run['attention']].colour for run in runs])


def _run_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
  """'MLA C=32'; with the cache's dtype or the workdir's name where else two would read alike."""
  family = styles(run['attention'] for run in runs)
  told = [
    family[run['attention']].label + (f' C={tables.latent(run)}' if tables.latent(run) else '')
    for run in runs
  ]
  if len({run['cache_dtype'] for run in runs}) > 1:
    told = [f'{text}\n{run["cache_dtype"]}' for text, run in zip(told, runs, strict=True)]
  folders = names(Path(run['workdir']).name for run in runs)
  return [
    f'{text}\n{folders[Path(run["workdir"]).name]}' if told.count(text) > 1 else text
    for text, run in zip(told, runs, strict=True)
  ]


def _least(sizes: Sequence[Number], points: Sequence[Point], told: Sequence[str]) -> str:
  """What the smallest caches keep of the largest, and at what perplexity; '' if all are equal."""
  if min(sizes) == max(sizes):
    return ''
  large = min(range(len(sizes)), key=lambda i: (-sizes[i], points[i].middle))
  small = [i for i, size in enumerate(sizes) if size == min(sizes)]
  more = [100 * (points[i].middle / points[large].middle - 1) for i in small]
  by = dict.fromkeys((f'{min(more):+.1f}', f'{max(more):+.1f}'))  # once if they read the same
  whom = ' and '.join(one_line(told[i]) for i in small) if len(small) < 3 else 'The smallest'
  return (
    f'{whom} keep{"s" if len(small) == 1 else ""} {share(min(sizes), max(sizes))} of '
    f"{one_line(told[large])}'s cache at {' to '.join(by)} % perplexity"
  )


def _finding(
  summary: Mapping[str, Any], reference: Mapping[str, Any], spot: Mapping[str, Any] | None
) -> tuple[str, str]:
  """The frontier's title, which claims what the sweet spot does, and how to read the picture."""
  whom, undecided = spoken(reference['arm']), summary['sweet_spot']['undecided']
  within = f'within {summary["margin"]:g} nats'
  remark = _bars_are(summary['arms'])
  if reference.get('failed_seeds'):
    title = f'Seeds of {whom} failed: there is no loss to stay {within} of'
  elif len(summary['arms']) == 1:
    title = f'{whom} alone: nothing to compare yet'
  elif spot is None:
    title = f'Undecided: these seeds cannot tell whether any smaller cache is {within} of {whom}'
  elif spot is reference:
    title = f'No smaller cache is {within} of {whom}'
  else:
    part = share(spot['kv_cache_bytes_per_token'], reference['kv_cache_bytes_per_token'])
    title = f"{spoken(spot['arm'])} keeps {part} of {whom}'s cache, its loss {within}"
    remark = f'With 95 % confidence (one-sided). {remark}'
  if undecided:
    few = ', '.join(one_line(text) for text in names(undecided).values())
    told = few if len(undecided) <= 3 else f'{len(undecided)} arms'
    remark += f' Undecided and smaller: {told}.'
  return title, remark


def _bars_are(arms: Sequence[Mapping[str, Any]]) -> str:
  seeds = sorted({arm['seeds'] for arm in arms})
  if seeds == [1]:
    return 'One seed an arm, so no intervals.'
  count = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  told = f"Bars: an arm's own two-sided 95 % over {count} seeds."
  if 2 in seeds:
    told += ' Over two they say little.'
  return told if all(map(_fair, arms)) else f'{told} *: no fair mean, see report.md.'


def _gains(arms: Sequence[Mapping[str, Any]]) -> str:
  """Up to which latent a wider one is shown to lose less, by the report's simultaneous steps."""
  of_name = {arm['arm']: arm for arm in arms}
  steps = [
    (of_name[arm['smaller_latent']], arm, arm['difference_to_smaller_latent'])
    for arm in sorted(arms, key=lambda arm: arm['latent_dim'])
    if arm.get('smaller_latent') in of_name
  ]
  steps = [step for step in steps if step[2] and step[2]['ci95_simultaneous']]
  shown = [step for step in steps if step[2]['ci95_simultaneous'][1] < 0]
  if not steps:
    best = min(arms, key=lambda arm: arm['mean_loss'])
    return f'Of the latents, C = {best["latent_dim"]} has the lowest mean loss'
  if not shown:
    return 'No wider latent is shown to lose less than the next narrower one'
  narrow, wide, d = shown[-1]
  run = narrow.get('prefix_of')  # where it is cut from a nested run, the other is that run's too
  of = f' of {run}' if run else ''
  told = f'C = {wide["latent_dim"]}{of} lies {-d["mean"]:.3f} nats below C = {narrow["latent_dim"]}'
  return told + ('; no wider latent is shown to gain more' if steps[-1] != shown[-1] else '')


def _fair(arm: Mapping[str, Any]) -> bool:
  """All seeds that judge it finished, and none of them chose its learning rate."""
  return not (arm.get('failed_seeds') or arm.get('tuned_on_itself'))


def _star(arm: Mapping[str, Any]) -> str:
  return '' if _fair(arm) else '*'


def _names(arms: Sequence[Mapping[str, Any]]) -> list[str]:
  told = names(arm['arm'] for arm in arms)
  return [told[arm['arm']] + _star(arm) for arm in arms]


def _point(arm: Mapping[str, Any]) -> Point:
  """An arm's mean, its interval (of no width where the data gives none) and its seeds' losses."""
  half, mean = arm['half_width'] or 0, arm['mean_loss']
  return Point(mean, mean - half, mean + half, tuple((arm.get('losses') or {}).values()))


def _nothing(figure: Figure, text: str) -> None:
  figure.text(0.5, 0.5, text, ha='center', va='center', color=GREY)
