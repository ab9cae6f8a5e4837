"""Pictures. Colours from Okabe and Ito's palette, told apart with any colour vision; the marker
says the attention again in print. Bytes are on a log scale. Each function draws on given axes."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla import files

STYLES = {
  'mha': ('#000000', 's'),
  'gqa': ('#0072B2', '^'),
  'mqa': ('#009E73', 'v'),
  'mla': ('#D55E00', 'o'),
}
OTHER = ('#CC79A7', 'D')  # a variant added since
APART = 0.09  # doublings between arms of equal bytes


def save(draw: Callable[..., None], path: Path, *args) -> None:
  """Draws on new axes and writes the file, whose ending says the format; needs no display."""
  figure = Figure(figsize=(6.4, 4.2), layout='constrained')
  draw(figure.subplots(), *args)
  picture = io.BytesIO()
  figure.savefig(picture, dpi=150, format=path.suffix[1:])
  files.write_whole(path, picture.getvalue())


def perplexity(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
  """eval.py's runs: perplexity against cache bytes per token, with the interval over windows.

  Runs of equal bytes stand side by side.
  """
  for run in runs:
    size, middle = run['kv_cache_bytes_per_token'], run['perplexity']
    equals = [other for other in runs if other['kv_cache_bytes_per_token'] == size]
    shift = equals.index(run) - (len(equals) - 1) / 2
    x = size * 2 ** (shift * APART)
    colour, marker = STYLES.get(run['attention'], OTHER)
    low, high = run['perplexity_ci95'] or (middle, middle)  # too few windows: no bar
    bars = [[max(middle - low, 0)], [max(high - middle, 0)]]  # all windows alike: rounding decides
    axes.errorbar([x], [middle], bars, color=colour, marker=marker, linestyle='none', capsize=3)
    latent = f' C={run["latent_dim"]}' if run['latent_dim'] else ''
    left = shift < 0
    axes.annotate(
      f'{run["attention"].upper()}{latent}',
      (x, middle),
      textcoords='offset points',
      xytext=(-8 if left else 8, 4),
      horizontalalignment='right' if left else 'left',
      color=colour,
      fontsize=9,
    )
  _bytes_axis(axes)
  axes.set_ylabel('perplexity per token (bars: 95 % over windows)')
  axes.margins(x=0.15)
  axes.set_title(f'Perplexity read through a {runs[0]["cache_dtype"]} cache')


def frontier(axes: Axes, summary: Mapping[str, Any]) -> None:
  """A sweep's arms: mean loss against cache bytes, 95 % over seeds; the frontier as a line.

  Filled markers lie on the frontier with 95 % confidence, open ones may, pale ones do not. Arms of
  equal bytes stand side by side.
  """
  arms = summary['arms']
  best: list[Mapping[str, Any]] = []
  for arm in arms:  # by bytes: those that no smaller one beats
    if not best or arm['mean_loss'] < best[-1]['mean_loss']:
      best.append(arm)
  axes.step(
    [arm['kv_cache_bytes_per_token'] for arm in best],
    [arm['mean_loss'] for arm in best],
    where='post',
    color='#999999',
    linewidth=1,
    zorder=0,
  )
  for arm in arms:
    colour, marker = STYLES.get(arm['attention'], OTHER)
    face = {'yes': colour, 'uncertain': 'white', 'no': 'none'}[arm['on_frontier']]
    equals = [a for a in arms if a['kv_cache_bytes_per_token'] == arm['kv_cache_bytes_per_token']]
    shift = equals.index(arm) - (len(equals) - 1) / 2
    x = arm['kv_cache_bytes_per_token'] * 2 ** (shift * APART)
    axes.errorbar(
      [x],
      [arm['mean_loss']],
      None if arm['half_width'] is None else [arm['half_width']],
      color=colour,
      marker=marker,
      markerfacecolor=face,
      alpha=0.45 if arm['on_frontier'] == 'no' else 1,
      linestyle='none',
      capsize=3,
    )
    axes.annotate(
      arm['arm'],
      (x, arm['mean_loss'] + (arm['half_width'] or 0)),
      textcoords='offset points',
      xytext=(0, 4),
      rotation=90,
      horizontalalignment='center',
      color=colour,
      fontsize=7,
    )
  reference = next(arm for arm in arms if arm['arm'] == summary['reference'])
  limit = reference['mean_loss'] + summary['margin']
  axes.axhline(limit, color='#999999', linestyle=':', linewidth=1)
  axes.annotate(
    f'{summary["reference"]} + {summary["margin"]} nats',
    (1, limit),  # beside the axes, where no arm's name is
    xycoords=('axes fraction', 'data'),
    textcoords='offset points',
    xytext=(3, 0),
    verticalalignment='center',
    color='#666666',
    fontsize=7,
  )
  _bytes_axis(axes)
  axes.set_xticks(sorted({arm['kv_cache_bytes_per_token'] for arm in arms}))
  axes.tick_params(axis='x', labelsize=7, rotation=45)
  axes.set_ylabel('validation loss, nats per token')
  seeds = sorted({arm['seeds'] for arm in arms})
  count = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  axes.set_title(f'Bars: 95 % over {count} seeds. Filled: on the frontier; open: maybe; pale: not')
  axes.title.set_fontsize(9)
  axes.margins(x=0.15, y=0.15)


def latent_knob(axes: Axes, summary: Mapping[str, Any]) -> None:
  """The MLA arms: loss against latent_dim (log scale); MHA, GQA and MQA as lines."""
  arms = sorted((a for a in summary['arms'] if a['latent_dim']), key=lambda a: a['latent_dim'])
  colour, marker = STYLES['mla']
  axes.errorbar(
    [arm['latent_dim'] for arm in arms],
    [arm['mean_loss'] for arm in arms],
    [arm['half_width'] or 0 for arm in arms],
    color=colour,
    marker=marker,
    capsize=3,
    label='MLA',
  )
  for arm in summary['arms']:
    if arm['latent_dim'] is None and arm['arm'] in ('mha', 'mqa', 'gqa'):
      colour, _ = STYLES[arm['attention']]
      label = f'{arm["arm"]}, {arm["kv_cache_bytes_per_token"]:,.0f} bytes'
      axes.axhline(arm['mean_loss'], color=colour, linestyle='--', linewidth=1, label=label)
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
  axes.set_xlabel('latent_dim C (log scale)')
  axes.set_ylabel('validation loss, nats per token')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


def _bytes_axis(axes: Axes) -> None:
  axes.set_xscale('log', base=2)
  axes.minorticks_off()
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
  axes.set_xlabel('KV cache, bytes per token (log scale)')
  axes.grid(alpha=0.3)


def bars(axes: Axes, series: Mapping[str, Mapping[str, float]], unit: str) -> None:
  """{series: {label: value}} as groups of horizontal bars, values written beside them."""
  labels = list(next(iter(series.values())))
  height = 0.8 / len(series)
  shades = ('#0072B2', '#E69F00', '#009E73')
  for index, (name, values) in enumerate(series.items()):
    places = [place + index * height for place in range(len(labels))]
    drawn = axes.barh(places, [values[label] for label in labels], height, label=name)
    for bar in drawn:
      bar.set_color(shades[index % len(shades)])
    axes.bar_label(drawn, fmt='{:,.4g}', padding=3, fontsize=8)
  axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set_xlabel(unit)
  if len(series) > 1:
    axes.legend(fontsize=8)


def equal_bytes(axes: Axes, summary: Mapping[str, Any]) -> None:
  """Arms whose caches have the same bytes, side by side: mean loss and 95 % over seeds."""
  arms = summary['arms']
  sizes = [arm['kv_cache_bytes_per_token'] for arm in arms]
  groups = [size for size in sorted(set(sizes)) if sizes.count(size) > 1]
  for place, size in enumerate(groups):
    group = [arm for arm in arms if arm['kv_cache_bytes_per_token'] == size]
    for index, arm in enumerate(group):
      colour, marker = STYLES.get(arm['attention'], OTHER)
      x = place + (index - (len(group) - 1) / 2) * 0.22
      axes.errorbar(
        [x], [arm['mean_loss']], [arm['half_width'] or 0], color=colour, marker=marker, capsize=3
      )
      axes.annotate(
        arm['arm'],
        (x, arm['mean_loss']),
        textcoords='offset points',
        xytext=(6, 0),
        rotation=45,
        fontsize=7,
        color=colour,
      )
  axes.set_xticks(range(len(groups)), [f'{size:,.0f}' for size in groups])
  axes.set_xlim(-0.6, len(groups) - 0.4)
  axes.set_xlabel('KV cache, bytes per token')
  axes.set_ylabel('validation loss, nats per token')
  axes.grid(alpha=0.3, axis='y')


def cache_memory(axes: Axes, sizes: Mapping[str, Mapping[int, float]]) -> None:
  """{name: {context: bytes}}: a cache's memory against context, both on log scales."""
  dashes = ('-', '--', ':', '-.')
  for index, (name, of) in enumerate(sizes.items()):
    colour, marker = STYLES.get(name.split()[0].split('-')[0], OTHER)
    axes.plot(
      list(of),
      [size / 2**20 for size in of.values()],
      color=colour,
      marker=marker,
      linestyle=dashes[index % len(dashes)],
      label=name,
    )
  axes.set_xscale('log', base=2)
  axes.set_yscale('log', base=2)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(lambda value, _: f'{value:,.6g}')
  axes.minorticks_off()
  axes.set_xlabel('context, tokens (log scale)')
  axes.set_ylabel('KV cache, MiB (log scale)')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
