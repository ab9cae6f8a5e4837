"""docs/add_a_variant.md followed to the letter, in a copy of the project: `make test-variant`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'add_a_variant.md').read_text()


def insert(path: Path, before: str, lines: str) -> None:
  """The lines before the only line that ends a table, or opens one."""
  text = path.read_text()
  assert text.count(before) == 1
  path.write_text(text.replace(before, lines + before))


def test_a_variant_is_one_file_one_entry_one_config_and_one_line(tmp_path):
  for name in ('mla', 'configs', 'tests'):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
  module, entry, config, arm = re.findall(r'```python\n(.*?)```', PAGE, re.S)
  for place in ('mla/attention/two_latents.py', 'configs/gla2_small.py'):
    assert f'`{place}`:' in PAGE
  (tmp_path / 'mla/attention/two_latents.py').write_text(module)
  (tmp_path / 'configs/gla2_small.py').write_text(config)
  imported, named = entry.splitlines(keepends=True)
  switch = tmp_path / 'mla/attention/__init__.py'
  insert(switch, 'from mla.attention.variant import Variant\n', imported)
  text = switch.read_text()
  opened = text.index('VARIANTS: dict')
  end = text.index('}\n', opened)
  switch.write_text(text[:end] + named + text[end:])
  insert(tmp_path / 'tests/conftest.py', '}\n\n\ndef tiny_config', arm)

  def run(*words: str) -> str:
    done = subprocess.run(
      [sys.executable, *words], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)},
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  said = run(
    '-m', 'pytest', '-q', '-k', 'gla2', 'tests/test_conformance.py', '-p', 'no:cacheprovider'
  )
  passed = re.search(r'(\d+) passed', said)
  assert passed and int(passed[1]) > 20, said
  assert 'GLA-2' in run('-c', CHECK)


# Its config keeps its rules and meets the budget; it is plotted under its name and in a look that
# no other has; a config that breaks a rule of its own is told so.
CHECK = """
from configs import gla2_small
from mla import config as config_lib
from mla.errors import UserError
from mla.model import solve_ffn_dim
from mla.plots import styles

config = gla2_small.get_config()
config_lib.validate(config)
assert solve_ffn_dim(config) > 100
looks = styles.styles(['mha', 'gqa', 'mqa', 'mla', 'gla2'])
assert len({look[1:] for look in looks.values()}) == 5
config.latent_dim = 33
try:
  config_lib.validate(config)
except UserError as error:
  assert str(error).startswith('latent_dim=33: gla2 needs'), error
else:
  raise AssertionError('33 is odd')
print(looks['gla2'].label)
"""
