"""prepare.py stopped, killed, and run to its end: the very files of a preparation undisturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import tiny_config

from mla.data.pipeline import load_data

ROOT = Path(__file__).parents[1]

# Imports once, then forks a child for each: it gets the signal when so many batches are written.
RUNS = """
import json, os, runpy, sys
import mla.cli
from mla.data import pipeline, token_files

token_files.BATCH = 500
append = token_files._Split._append
sys.argv = json.loads(sys.argv[1])
for number, after in [(15, 2), (9, 1), (0, 0)]:
  pid = os.fork()
  if not pid:
    def appending(*given):
      global after
      append(*given)
      after -= 1
      if not after:
        os.kill(os.getpid(), number)
    token_files._Split._append = appending
    runpy.run_path(sys.argv[0], run_name='__main__')
  print('exit code', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_it_goes_on_to_the_same_files(tmp_path):
  lines = [json.dumps({'text': f'{n} bottles of beer on the wall'}) for n in range(500)]
  (tmp_path / 'text.jsonl').write_text('\n'.join(lines))
  fields = {'data.files': f'{tmp_path}/text.jsonl', 'data.tokenizer': 'bpe:300'}
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  argv = ['prepare.py', '--config=configs/mla_small.py', *flags]
  argv.append(f'--config.data.data_dir={tmp_path}/disturbed')
  done = subprocess.run(
    [sys.executable, '-c', RUNS, json.dumps(argv)],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  codes = [line for line in done.stdout.splitlines() if line.startswith('exit code')]
  assert codes == ['exit code 143', 'exit code -9', 'exit code 0'], done.stderr
  assert 'stopped; run the same command again to go on' in done.stdout
  assert 'vocabulary 300' in done.stdout and 'Traceback' not in done.stderr
  data_dir = f'{tmp_path}/undisturbed'
  load_data(
    tiny_config(data__data_dir=data_dir, **{k.replace('.', '__'): fields[k] for k in fields})
  )
  made = [
    {path.name: path.read_bytes() for path in (tmp_path / name).glob('mla_tokens/*/[!m.]*')}
    for name in ('disturbed', 'undisturbed')
  ]
  assert made[0] == made[1] and len(made[0]) == 5  # two of each split, and the tokenizer
