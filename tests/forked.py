"""Runs the entry points many times at the price of one start: imports once, then forks.

Reads a line of JSON a command from stdin, {"argv": [...], "env": {...}}, and answers with one,
{"code", "out", "err", "rss"}, rss being its memory in bytes. JAX starts in the children only:
forking it once it runs is not safe.
"""

import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import traceback

import mla.cli  # noqa: F401
import mla.evaluate  # noqa: F401
import mla.generate  # noqa: F401
import mla.sweep.report  # noqa: F401
import mla.sweep.run  # noqa: F401
import mla.train  # noqa: F401

TIMEOUT = 60  # seconds
MOST_MEMORY = 12 * 2**30  # bytes of addresses, so that a runaway ends alone


def child(argv: list[str], env: dict[str, str], out: int, err: int) -> None:
  os.dup2(out, 1)
  os.dup2(err, 2)
  signal.alarm(TIMEOUT)
  resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
  os.environ.update(env)
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
      asked = json.loads(line)
      child(asked['argv'], asked.get('env', {}), out.fileno(), err.fileno())
    _, status, usage = os.wait4(pid, 0)
    out.seek(0)
    err.seek(0)
    answer = {
      'code': os.waitstatus_to_exitcode(status),
      'out': out.read().decode(),
      'err': err.read().decode(),
      'rss': usage.ru_maxrss * 1024,
    }
    print(json.dumps(answer), flush=True)
