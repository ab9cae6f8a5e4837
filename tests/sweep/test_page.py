"""What report.html holds, without a browser (tests/html has one): by the rules of the report."""

import json
import math
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from sweeps import made_up_sweep

from configs import base
from mla import config as config_lib
from mla.plots import styles
from mla.sweep import frontier, page, report, results, trials
from mla.sweep.page.contents import POINTS, STEPS, SYMBOLS, command, contents, margin_grid

PUBLISHED = Path(__file__).parent.parent.parent / 'results' / 'frontier'
DEFAULTS = config_lib.flatten(base.get_config())
HOSTILE = '</script><!--SCRIPT--><b>&amp;'


def shown(folder: Path) -> dict:
  summary = json.loads((folder / 'frontier.json').read_text())
  return contents(folder, summary, results.read_lines(folder / 'results.jsonl'), DEFAULTS)


@pytest.fixture(scope='module')
def published() -> dict:
  return shown(PUBLISHED)


@pytest.fixture(scope='module')
def made_up(tmp_path_factory) -> Path:
  folder = made_up_sweep(tmp_path_factory.mktemp('sweep'), {HOSTILE: ('gqa', 24.0, 1.25)})
  report.write(folder)
  return folder


@pytest.mark.parametrize('folder', [PUBLISHED, 'made_up'])
def test_the_slider_says_what_the_bounds_of_the_report_say(folder, request):
  folder = request.getfixturevalue(folder) if isinstance(folder, str) else folder
  summary = json.loads((folder / 'frontier.json').read_text())
  held = shown(folder)
  assert held['spots'][held['start']]['verdict'] == report.verdict(summary)
  assert held['spots'][held['start']]['arm'] == summary['sweet_spot']['arm']
  for spot in held['spots']:
    within, undecided = [], []
    for arm in summary['arms']:
      d = arm['difference']
      if arm['arm'] != summary['reference'] and d['one_sided_upper_95_simultaneous'] is not None:
        if d['one_sided_upper_95_simultaneous'] <= spot['margin']:
          within.append(arm)
        elif d['one_sided_lower_95_simultaneous'] <= spot['margin']:
          undecided.append(arm['arm'])
    least = min((arm['kv_cache_bytes_per_token'] for arm in within), default=math.inf)
    best = [arm['arm'] for arm in within if arm['kv_cache_bytes_per_token'] == least]
    if best:
      assert spot['arm'] in best
    else:
      assert spot['arm'] == (None if undecided else summary['reference'])
    assert f'within {spot["margin"]} nats' in spot['verdict']
  assert len({spot['arm'] for spot in held['spots']}) > 2


@pytest.mark.parametrize('margin', [0.0, 1e-4, 0.02, 0.0217, 3.0, 250.0])
def test_margins_are_few_and_the_reports_is_one(margin):
  summary = json.loads((PUBLISHED / 'frontier.json').read_text())
  grid = margin_grid({**summary, 'margin': margin})
  assert grid[0] == 0 and grid == sorted(set(grid)) and margin in grid
  assert 10 < len(grid) <= STEPS + 2
  assert grid[-1] >= 2 * margin


def test_a_reference_that_failed_has_no_sweet_spot_at_any_margin():
  summary = json.loads((PUBLISHED / 'frontier.json').read_text())
  for arm in summary['arms']:
    if arm['arm'] == summary['reference']:
      arm['failed_seeds'] = [1]
  assert frontier.sweet_spot_at(summary, 10.0)['arm'] is None


def test_every_marker_has_its_symbol():
  assert {marker for _, marker in styles.LOOKS} <= SYMBOLS.keys()


def test_a_command_trains_the_trial_it_is_of(made_up):
  lines = results.read_lines(made_up / 'results.jsonl')
  assert len(lines) == 15
  for line in lines:
    said = shlex.split(' '.join(command(line, DEFAULTS)))
    assert said[:3] == ['python', 'train.py', '--config=configs/base.py']
    config = base.get_config()
    for word in said[3:-1]:
      name, value = re.fullmatch(r'--config\.([a-z_.]+)=(.*)', word).groups()
      kind = type(config_lib.field(config, name))
      config.update_from_flattened_dict({name: kind(value)})
    assert trials.digest(config) == line['digest']


def test_results_that_do_not_say_their_config_say_so(published):
  (arm,) = [arm for arm in published['arms'] if arm['arm'] == 'gqa']
  assert '--config=CONFIG' in arm['command'] and '--config.num_kv_heads=2' in arm['command']
  assert 'put it for CONFIG' in arm['remark']


def test_an_arms_figures_are_those_of_the_report(published):
  hovers = {
    name: text
    for trace in published['traces']
    if 'error_y' in trace
    for name, text in zip(trace['customdata'], trace['text'], strict=True)
  }
  for arm in json.loads((PUBLISHED / 'frontier.json').read_text())['arms']:
    text = hovers[arm['arm']].replace('<br>', ' ')
    low, high = arm['ci95']
    assert f'loss {arm["mean_loss"]:.4f} ({low:.4f} to {high:.4f}, two-sided 95 %' in text
    assert f'{arm["kv_cache_bytes_per_token"]:,.0f} bytes' in text
    assert ', '.join(f'{rate:g}' for rate in arm['learning_rates_tried']) in text
    assert '5 seeds: 1, 2, 3, 4, 5' in text and 'python train.py' in text


def test_cells_are_sorted_by_their_numbers(published):
  frontier_table = published['tables'][0]
  arms = json.loads((PUBLISHED / 'frontier.json').read_text())['arms']
  for arm, row in zip(arms, frontier_table['rows'], strict=True):
    values = dict(zip(frontier_table['heads'], row['values'], strict=True))
    assert row['arm'] == values['arm'] == arm['arm']
    assert values['bytes/token'] == arm['kv_cache_bytes_per_token']
    d = values['d (95 %, two-sided)']
    if arm['arm'] == 'mha':
      assert d is None
    else:
      assert d == pytest.approx(arm['difference']['mean'], abs=5e-5)


def test_curves_are_thinned_and_damage_leaves_one_out(made_up):
  lines = [line['trial'] for line in results.read_lines(made_up / 'results.jsonl')]
  of_mqa = [trial for trial in lines if trial.startswith('mqa')]
  assert len(of_mqa) == 3
  for number, trial in enumerate(of_mqa[:2]):
    path = made_up / 'trials' / trial / 'metrics.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    logged = [json.dumps({'step': step, 'loss': 1 / step}) for step in range(1, 1001)]
    path.write_text('\n'.join([*logged, json.dumps({'step': 1000, 'eval_loss': 1.0})]) + '\n')
    if number:
      path.write_bytes(b'\xff\x00')
  (arm,) = [arm for arm in shown(made_up)['arms'] if arm['arm'] == 'mqa']
  training, validation = arm['curves']
  assert len(training['x']) <= POINTS and training['x'][-1] == 1000
  assert validation['x'] == [1000]


def test_whatever_a_name_says_it_stays_data(made_up):
  held = shown(made_up)
  whole = page.whole(held, 'var Plotly;')
  assert whole.count('</script>') == 3 and '<!--' not in whole
  (embedded,) = re.findall(r'<script id="contents"[^>]*>(.*?)</script>', whole, re.S)
  assert json.loads(embedded) == held
  assert HOSTILE in [arm['arm'] for arm in held['arms']]
  texts = [text for trace in held['traces'] for text in trace.get('text', ())]
  assert not any('</script' in text for text in texts)


def test_the_page_names_no_other_and_forbids_it(published):
  whole = page.whole(published, '')
  assert not re.findall(r'(?:src|href)="(?!data:)|https?:|url\(|@import', whole)
  assert "default-src 'none'" in whole


def test_it_is_written_where_there_is_plotly(made_up, monkeypatch):
  offline = types.SimpleNamespace(get_plotlyjs=lambda: 'var Plotly = "the library";')
  monkeypatch.setitem(sys.modules, 'plotly', types.ModuleType('plotly'))
  monkeypatch.setitem(sys.modules, 'plotly.offline', offline)
  assert page.write(made_up, DEFAULTS) == f'written: {made_up / "report.html"}'
  assert 'the library' in (made_up / 'report.html').read_text()
  (made_up / 'report.html').unlink()
  monkeypatch.setitem(sys.modules, 'plotly.offline', None)
  told = page.write(made_up, DEFAULTS)
  assert "pip install -c constraints.txt -e '.[report]'" in told and '\n' not in told
  assert not (made_up / 'report.html').exists()
