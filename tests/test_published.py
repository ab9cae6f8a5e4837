"""What is published of the sweep agrees: results, frontier.json, report, README, notebooks."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from mla.sweep import looks, report, sections

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / 'results' / 'frontier'
README = (ROOT / 'README.md').read_text()
NUMBERS = 'no one two three four five six seven eight nine ten eleven twelve thirteen'.split()


def same(a, b) -> bool:
  """Equal to the digit; the last bits of a float are the machine's."""
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-9)
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(same, a, b))
  return a == b


def test_what_is_published_comes_from_the_results(tmp_path):
  folder = Path(shutil.copytree(PUBLISHED, tmp_path / 'copy'))
  kept = json.loads((PUBLISHED / 'frontier.json').read_text())
  report.write(folder, kept['reference'], kept['margin'])
  assert same(json.loads((folder / 'frontier.json').read_text()), kept)
  assert (folder / 'report.md').read_text() == (PUBLISHED / 'report.md').read_text()
  assert report.written(kept) == (PUBLISHED / 'report.md').read_text()


def test_the_published_looks_are_all_there():
  """After 3, 5 and 6 seeds (docs/log.md), each with the trials that were done by then."""
  lines = [json.loads(text) for text in (PUBLISHED / 'results.jsonl').read_text().splitlines()]
  history = looks.read(PUBLISHED)
  assert [look['seeds'] for look in history] == [list(range(n)) for n in (3, 5, 6)]
  for look in history:
    assert look['trials'] == sum(line['seed'] in look['seeds'] for line in lines)


def sweep_section() -> str:
  """What is said of the sweep before its picture, in one line."""
  section = re.search(r'## How small may the latent be\?\n(.*?)!\[', README, re.S)
  assert section is not None
  return ' '.join(section[1].split())


def sweep_sentences() -> list[str]:
  """What the section says with numbers, made again from the results."""
  summary = json.loads((PUBLISHED / 'frontier.json').read_text())
  lines = [json.loads(line) for line in (PUBLISHED / 'results.jsonl').read_text().splitlines()]
  arms = {arm['arm']: arm for arm in summary['arms']}
  spot, reference = summary['sweet_spot'], summary['reference']
  size = {name: f'{arm["kv_cache_bytes_per_token"]:,.0f}' for name, arm in arms.items()}
  most = {
    name: f'{arm["difference"]["one_sided_upper_95_simultaneous"]:.4f}'
    for name, arm in arms.items()
    if name != reference
  }
  needed = {name: NUMBERS[n] for name, n in spot['seeds_in_all'].items() if n < len(NUMBERS)}
  small, smallest = 'mqa', 'mqa-8-heads-of-16'

  def against(name: str, what: str, sign: int = 1) -> tuple[str, str]:
    """A difference of the report (turned around where `sign` is -1), and its interval."""
    d = arms[name][what]
    low, high = sorted(sign * end for end in d['ci95_simultaneous'])
    return f'{sign * d["mean"]:.4f}', f'{low:.4f} to {high:.4f}'

  def gain(latent: int) -> tuple[str, str]:
    return against(f'mla-c{latent}', 'difference_to_smaller_latent', -1)

  def behind(name: str) -> tuple[str, str]:
    assert arms[name]['best_of_equal_bytes'] == small
    return against(name, 'difference_at_equal_bytes')

  assert spot['arm'] == 'gqa' and reference == 'mha' and spot['undecided'][0] == smallest
  assert small in spot['undecided']
  (judges,) = {arm['seeds'] for arm in arms.values()}
  (rates,) = {len(arm['learning_rates_tried']) for arm in arms.values()}
  (steps,) = {line['step'] for line in lines}
  (weights,) = {f'{arm["params_non_embedding"] / 1e6:.1f}M' for arm in arms.values()}
  rotary = arms['mla-c16']['fields']['rope_dim']
  half = 2 * arms['gqa']['kv_cache_bytes_per_token'] == arms['mha']['kv_cache_bytes_per_token']
  assert half and [arm for arm in arms if arms[arm]['learning_rate_at_edge']] == ['mla-c2']
  steps_told = {latent: gain(latent) for latent in (8, 16, 32, 64)}
  undoubted = [latent for latent, (_, told) in steps_told.items() if not told.startswith('-')]
  assert undoubted == [8]
  loss, loss_between = against('mla-c128', 'difference_to_smaller_latent')
  off = [a['latent_dim'] for a in arms.values() if a['latent_dim'] and a['on_frontier'] == 'no']
  cannot_tell = [
    a['latent_dim'] for a in arms.values() if a['latent_dim'] and a['on_frontier'] == 'uncertain'
  ]
  assert size['mla-c32'] == size['mha-1-head'] == size[small]
  share = {
    a['latent_dim']: rotary / (rotary + a['latent_dim']) for a in arms.values() if a['latent_dim']
  }
  return [
    f'{NUMBERS[len(arms)].capitalize()} arms of {weights} non-embedding parameters, {steps} steps, '
    f'{NUMBERS[rates]} learning rates an arm. One seed chose',
    f'{NUMBERS[judges]} others judge it (`*-c16` is MLA with `latent_dim=16` and a rotary key of '
    f'{rotary}',
    f"to be within {summary['margin']} of MHA is GQA's with two key heads, {size['gqa']} bytes, "
    f"half of MHA's: it loses at most {most['gqa']} (one-sided 95 %",
    f'with {size[small]} bytes it lost {arms[small]["difference"]["mean"]:.4f} and with eight '
    f'heads of 16, {size[smallest]} bytes, {arms[smallest]["difference"]["mean"]:.4f}, but '
    f'{NUMBERS[judges]} seeds only bound that by {most[small]} and {most[smallest]}. '
    f'{needed[small].capitalize()} and {needed[smallest]} seeds',
    'below a latent of 8: C = 8 gains {} over C = 2 ({})'.format(*steps_told[8]),
    f'learning rate, {arms["mla-c2"]["learning_rate"]:g}, is an edge of those tried. From 8 to 64 '
    'no doubling',
    '(8 to 16 gains {}, {};'.format(*steps_told[16]),
    '32 to 64 gains {}, {})'.format(*steps_told[64]),
    f'C = 128, as wide as the model, loses {loss} to C = 64 ({loss_between})',
    'C = {}, {} and {} are off the frontier'.format(*off),
    'of C = {}, {} and {} it cannot be told'.format(*cannot_tell),
    'Of arms of {} bytes C = 32 is {} behind MQA ({})'.format(size[small], *behind('mla-c32')),
    'MHA with one head {} ({})'.format(*behind('mha-1-head')),
    f'MLA up to C = {max(latent for latent, part in share.items() if part >= 0.5)} are its rotary',
    'The intervals are two-sided 95 %',
  ]


def test_what_is_said_of_the_sweep_is_what_its_results_say():
  section = sweep_section()
  assert not [sentence for sentence in sweep_sentences() if sentence not in section]


def test_no_other_number_stands_there():
  left = sweep_section()
  for sentence in sweep_sentences():
    left = left.replace(sentence, '')
  assert not re.findall(r'[^.;]*\d[^.;]*', re.sub(r'^\d\.|(?<= )[123]\. ', '', left))


@pytest.mark.parametrize('name', ['latent_sweep', 'mla_explained'])
def test_what_a_notebook_shows_is_what_its_code_would_print_now(name):
  """Outputs are committed, and would go on telling what older results said."""
  summary = json.loads((PUBLISHED / 'frontier.json').read_text())
  notebook = json.loads((ROOT / 'notebooks' / f'{name}.ipynb').read_text())
  told = {
    'print(sections.narrowest(summary))': sections.narrowest(summary),
    'print(report.verdict(summary))': report.verdict(summary),
    'print(report.frontier_table(summary))': report.frontier_table(summary),
    "print(*report.warnings(summary), sep='\\n')": '\n'.join(report.warnings(summary)),
  }
  found = 0
  for cell in notebook['cells']:
    source, outputs = ''.join(cell['source']), cell.get('outputs', [])
    shown = ''.join(''.join(out.get('text', '')) for out in outputs)
    for call, text in told.items():
      if call in source:
        found += 1
        assert text in shown
  assert found == {'latent_sweep': 4, 'mla_explained': 2}[name]
