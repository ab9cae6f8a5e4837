"""--help: short, quick, complete; and what stands in it is said once, in configs/base.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import base
from mla import help
from mla.fields import flatten

ROOT = Path(__file__).parent.parent
TWO_SCREENS = 100  # lines
ENTRIES = sorted(path.name for path in ROOT.glob('*.py'))
ASK = """
import runpy, sys
sys.argv = [sys.argv[1], '--help']
try:
  runpy.run_path(sys.argv[0], run_name='__main__')
finally:
  assert 'jax' not in sys.modules, 'JAX was imported'
"""


@pytest.mark.parametrize('entry', ENTRIES)
def test_a_page_of_help(entry):
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, '-c', ASK, entry],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '100'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert time.monotonic() - began < 30  # 0.3 s where nothing else runs
  page = done.stdout.splitlines()
  assert len(page) <= TWO_SCREENS and max(map(len, page)) <= 100
  assert done.stdout.count(f'  python {entry} ') >= 3  # examples
  assert ('--workdir' in done.stdout) == (entry != 'prepare.py')
  if '--config=' in done.stdout.split('Flags:')[1]:
    for name, value in flatten(base.get_config()).items():
      assert f'  {name}={value}' in done.stdout


def test_every_field_says_what_it_is():
  told = help.comments(Path(base.__file__).read_text())
  values = flatten(base.get_config())
  assert set(told) == set(values)
  silent = {name for name in values if not told[name]}
  assert silent <= {'mesh.fsdp', 'mesh.tensor'}  # mesh.data speaks for them
  assert told['latent_dim'] == 'C, mla only: the width of the cached latent'


def test_comments_behind_above_and_over_several_fields():
  source = """
      # Attention: a heading.
      'attention': 'mha',  # mha | gqa
      # How far it reaches. More of it
      # goes on here.
      'rope_base': 100.0,
      'data': {
        'files': '',  # a glob
      },
      'seed': 0,
"""
  assert help.comments(source) == {
    'attention': 'mha | gqa', 'rope_base': 'How far it reaches', 'data.files': 'a glob', 'seed': '',
  }  # fmt: skip
