"""Every notebook runs from top to bottom on a made-up sweep, and is committed with outputs.

No text of a figure overlaps another or is cut off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_sweep

from mla import report, sweep, trials

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob('notebooks/*.ipynb'))


LOSSES = {'mha': 1.2, 'mqa': 1.22, 'c8': 1.21, 'c4': 1.3}
LATENTS = {'c8': 8, 'c4': 4}


@pytest.fixture(scope='module')
def small_sweep(tmp_path_factory) -> Path:
  """Arms of known losses, two of equal bytes, as a sweep leaves them."""
  folder = tmp_path_factory.mktemp('sweep')
  results = sweep.Results(folder)
  for number, (arm, loss) in enumerate(LOSSES.items()):
    fields = {'rope_dim': 4, 'latent_dim': 4 + number}  # equal configs would be one trial
    for seed in (0, 1, 2):
      (trial,) = trials.expand(
        test_sweep.tiny_config('mla'), {arm: fields}, [trials.parse_axis(f'seed={seed}')]
      )
      line = {
        **test_sweep.fake_line(trial, {arm: trial.learning_rate}),
        'attention': 'mla' if arm in LATENTS else arm,
        'latent_dim': LATENTS.get(arm),
        'loss': loss + 0.001 * seed,
        'flops_per_token': 7e6,
        'kv_cache_bytes_per_token': {'mha': 64.0, 'c4': 8.0}.get(arm, 16.0),
      }
      if arm == 'c4':  # what training costs is not always known
        line['flops_per_token'] = line['training_memory'] = None
      results.add(line)
  report.write(folder)
  return folder


CHECK = """
from pictures import faults
found = [fault for number in plt.get_fignums() for fault in faults(plt.figure(number))]
assert plt.get_fignums() and not found, found
"""


def cells(path: Path, kind: str) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def test_there_are_four():
  assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, small_sweep):
  code = '\n\n'.join(''.join(cell['source']) for cell in cells(path, 'code')) + CHECK
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT / 'notebooks',
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
      'MLA_LAB_SWEEP': str(small_sweep),
      'MPLBACKEND': 'Agg',
      'JAX_PLATFORMS': 'cpu',
    },
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
  code = cells(path, 'code')
  assert any('image/png' in out.get('data', {}) for cell in code for out in cell['outputs'])
  for cell in code:
    assert not any(out['output_type'] == 'error' for out in cell['outputs'])
    assert len(''.join(cell['source']).splitlines()) <= 25, 'logic belongs into mla/'
  assert str(ROOT) not in path.read_text()
