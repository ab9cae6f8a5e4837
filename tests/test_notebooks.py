"""Every notebook runs from top to bottom on a made-up sweep and a tiny run, and has its outputs.

No text of a figure overlaps another or is cut off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config
from sweeps import made_up_caches, made_up_probe, made_up_sweep

from mla.sweep import report
from mla.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob('notebooks/*.ipynb'))


@pytest.fixture(scope='module')
def small_sweep(tmp_path_factory) -> Path:
  """Arms of known losses, two of equal bytes, as a sweep leaves them."""
  folder = made_up_sweep(tmp_path_factory.mktemp('sweep'))
  report.write(folder)
  return folder


@pytest.fixture(scope='module')
def small_probes(tmp_path_factory) -> Path:
  """What results/probes has: sweeps over records of two sizes, and one read through int8."""
  root = tmp_path_factory.mktemp('probes')
  for attributes in (4, 8):
    folder = root / f'payload_{attributes}'
    folder.mkdir()
    report.write(made_up_probe(folder, attributes))
  runs = made_up_caches([0.8, 0.7], [0.79, 0.7])
  (root / 'payload_int8.json').write_text(json.dumps({'runs': runs}))
  return root


@pytest.fixture(scope='module')
def tiny_run(text, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('runs') / 'mla'
  fields = {'num_layers': 1, 'eval_every': 4, 'checkpoint_every': 4, 'data__eval_tokens': 64}
  train_and_evaluate(tiny_config('mla', data__files=str(text), **fields), workdir)
  return workdir


CHECK = """
from pictures import faults
found = [fault for number in plt.get_fignums() for fault in faults(plt.figure(number))]
assert plt.get_fignums() and not found, found
"""


def cells(path: Path, kind: str) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def test_there_are_eight():
  assert len(NOTEBOOKS) == 8


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, small_sweep, small_probes, tiny_run):
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
      'MLA_LAB_RUN': str(tiny_run),
      'MLA_LAB_PROBES': str(small_probes),
      'MPLBACKEND': 'Agg',
      'JAX_PLATFORMS': 'cpu',
    },
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
  code = cells(path, 'code')
  assert any('image/png' in out.get('data', {}) for cell in code for out in cell['outputs'])
  # In one go: a cell put in later by hand, with another's outputs, has another's number.
  assert [cell['execution_count'] for cell in code] == [*range(1, len(code) + 1)]
  for cell in code:
    assert not any(out['output_type'] == 'error' for out in cell['outputs'])
    assert len(''.join(cell['source']).splitlines()) <= 25, 'logic belongs into mla/'
  assert str(ROOT) not in path.read_text()
