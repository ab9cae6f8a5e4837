"""Tables and pictures from evaluated runs."""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

GIB = 2**30
CONTEXT = 8192

# Okabe and Ito's palette, told apart with any colour vision; the marker says it again in print.
STYLES = {
  'mha': ('#000000', 's'),
  'gqa': ('#0072B2', '^'),
  'mqa': ('#009E73', 'v'),
  'mla': ('#D55E00', 'o'),
}
OTHER = ('#CC79A7', 'D')  # a variant added since


def table(runs: list[dict]) -> str:
  """One line a run, by cache bytes; and what the bytes mean."""
  heads = (
    'run', 'attention', 'latent', 'params', 'step', 'cache', 'bytes/token', 'perplexity', '95 %',
    'bits/byte', 'tokens/GiB', 'users/GiB at 8k',
  )  # fmt: skip
  rows = [heads]
  for run in sorted(runs, key=lambda run: run['kv_cache_bytes_per_token']):
    size = run['kv_cache_bytes_per_token']
    low, high = run['perplexity_ci95']
    rows.append((
      Path(run['workdir']).name,
      run['attention'],
      str(run['latent_dim'] or '-'),
      f'{run["params_non_embedding"]:,}',
      str(run['step']),
      run['cache_dtype'],
      f'{size:,.0f}',
      f'{run["perplexity"]:.4f}',
      f'{low:.4f} to {high:.4f}',
      f'{run["bits_per_byte"]:.4f}',
      f'{GIB / size:,.0f}',
      f'{GIB / size / CONTEXT:,.1f}',
    ))  # fmt: skip
  widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
  left = {0, 1, 5}  # words; the rest are numbers
  lines = [
    '  '.join(
      cell.ljust(width) if column in left else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def plot(runs: list[dict], path: Path) -> None:
  """Perplexity against cache bytes per token (log scale), with the interval over windows.

  Runs of equal bytes stand side by side, a twentieth of a doubling apart.
  """
  figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
  for run in runs:
    size, middle = run['kv_cache_bytes_per_token'], run['perplexity']
    equals = [other for other in runs if other['kv_cache_bytes_per_token'] == size]
    shift = equals.index(run) - (len(equals) - 1) / 2
    x = size * 2 ** (shift / 20)
    colour, marker = STYLES.get(run['attention'], OTHER)
    low, high = run['perplexity_ci95']
    axes.errorbar(
      [x],
      [middle],
      [[middle - low], [high - middle]],
      color=colour,
      marker=marker,
      linestyle='none',
      capsize=3,
    )
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
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
  axes.set_xlabel('KV cache, bytes per token (log scale)')
  axes.set_ylabel('perplexity per token (bars: 95 % over windows)')
  axes.margins(x=0.15)
  axes.grid(alpha=0.3)
  axes.set_title(f'Perplexity read through a {runs[0]["cache_dtype"]} cache')
  figure.savefig(path, dpi=150)
  plt.close(figure)
