"""A nested trial's widths as arms: one run is trained, and each prefix of its latent is judged.

The trial's own line tells of the whole latent, its 'prefixes' of the rest, widest first. The prefix
of 16 dims of arm `nested` is the arm `nested@16`. It has the learning rate that the whole chose:
there is only one run.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# What 'prefixes' tell of each, and what of some only.
FIGURES = (
  *'latent_dim params_total params_non_embedding kv_cache_bytes_per_token'.split(),
  *'perplexity loss'.split(),
)
OF_SOME = ('bits_per_byte', 'accuracy', 'bits_recalled')  # of text, and of probes


def name(whole: str, width: int) -> str:
  """Of a trial or an arm whose latent is cut; no trial's own name has an @."""
  return f'{whole}@{width}'


def by_width(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The lines, behind each those of its prefixes; all of a trial that failed have failed.

  'prefix_of' of a prefix's line is the arm that was trained.
  """
  lines = list(lines)
  widths = {
    line['arm_digest']: [prefix['latent_dim'] for prefix in line['prefixes']]
    for line in lines
    if 'prefixes' in line
  }
  found = []
  for line in lines:
    whole = {key: value for key, value in line.items() if key != 'prefixes'}
    found.append(whole)
    failed = [{'latent_dim': width} for width in widths.get(line['arm_digest'], [])]
    # What a prefix does not tell it has not: the whole's figures are of the whole.
    shared = {key: value for key, value in whole.items() if key not in (*FIGURES, *OF_SOME)}
    prefixes = failed if line['status'] == 'failed' else line.get('prefixes', [])
    for prefix in prefixes:
      width = prefix['latent_dim']
      names = {key: name(line[key], width) for key in ('trial', 'arm')}
      found.append({**shared, **prefix, **names, 'prefix_of': line['arm']})
  return found
