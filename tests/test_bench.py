"""The benches' arithmetic, and one of them for real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import decode_growth, harness

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
  'better, figures, ratios',
  [
    # Tokens a second: ours over the peer's, each side's best setting.
    (max, {'ours': [10, 30, 20], 'peer': [5, 10, 20]}, (1, 2, 3)),
    # Milliseconds: the peer's over ours.
    (min, {'ours': [1, 2, 4], 'peer': [4, 4, 4]}, (1, 2, 4)),
  ],
)
def test_ratios_are_of_the_best_settings_round_by_round(monkeypatch, better, figures, ratios):
  asked = []

  def run_worker(module, side, case):
    asked.append(side)
    value = figures[side][(len(asked) - 1) // 2]
    return {'good': {'x': value}, 'bad': {'x': value / 9 if better is max else value * 9}}

  monkeypatch.setattr(harness, 'run_worker', run_worker)
  row = harness.side_by_side('bench.any', {}, 3, 'x', better)
  assert asked == ['ours', 'peer'] * 3
  assert (row['ratio_min'], row['ratio'], row['ratio_max']) == ratios
  assert row['peer_setting'] == 'good'


def test_decode_growth_measures_each_context(tmp_path):
  path = tmp_path / 'growth.json'
  subprocess.run(
    [
      *(sys.executable, '-m', 'bench.decode_growth', '--variants=mla', '--dtypes=int8'),
      *('--contexts=64,256', '--batches=2', f'--json={path}'),
    ],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )
  written = json.loads(path.read_text())
  assert {'hardware', 'versions'} <= written.keys()
  short, long = written['rows']
  per_token = 4 * (32 + 4 + 32 + 4)  # layers x int8 latent and rotary key, each with its scale
  assert long['cache_bytes'] - short['cache_bytes'] == 2 * (256 - 64) * per_token
  assert all(row['ms_per_token'] > 0 and row['read_ms'] > 0 for row in written['rows'])


def test_bytes_handed_over_count_an_array_as_often_as_it_is_given():
  call = (
    '%out.{n} = f32[2,1,4,8] custom-call(%query, %latent, %none, %rope, %none, /*index=5*/%latent, '
    '%positions), custom_call_target="mla_cached_forward", operand_layout_constraints={{'
    'f32[2,1,4,8]{{3,2,1,0}}, bf16[2,100,8]{{2,1,0}}, f32[2,0]{{1,0}}, bf16[2,100,4]{{2,1,0}}, '
    'f32[2,0]{{1,0}}, bf16[2,100,8]{{2,1,0}}, s32[2,1]{{1,0}}}}, api_version=API_VERSION_TYPED_FFI'
  )
  other = '%x = f32[9] custom-call(%y), custom_call_target="mla_append"'
  program = '\n'.join([call.format(n=1), other, call.format(n=2)])
  each = 4 * 64 + 2 * 1600 + 2 * 800 + 2 * 1600 + 4 * 2  # the latent as key and as value
  assert decode_growth.bytes_handed_over(program) == 2 * each
