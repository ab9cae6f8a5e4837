"""Runs the entry points many times at the price of one start: imports once, then forks.

Reads a line of JSON a command from stdin, {"argv": [...]}, and answers with one,
{"code", "out", "err"}. JAX starts in the children only; forking it once it runs is not safe.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

import mla.cli  # noqa: F401
import mla.evaluate  # noqa: F401
import mla.report  # noqa: F401
import mla.train  # noqa: F401

TIMEOUT = 60  # seconds


def child(argv: list[str], out: int, err: int) -> None:
  os.dup2(out, 1)
  os.dup2(err, 2)
  signal.alarm(TIMEOUT)
  sys.argv = argv
  code = 0
  try:
    runpy.run_path(argv[0], run_name='__main__')
  except SystemExit as leaving:
    code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
  except BaseException:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


for line in sys.stdin:
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    pid = os.fork()
    if pid == 0:
      child(json.loads(line)['argv'], out.fileno(), err.fileno())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out.seek(0)
    err.seek(0)
    answer = {'code': code, 'out': out.read().decode(), 'err': err.read().decode()}
    print(json.dumps(answer), flush=True)
