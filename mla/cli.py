"""What the entry points share: flags, the compilation cache, and errors of one line."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from mla.errors import Diverged, UserError

EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 143  # 143 = 128 + SIGTERM, as a shell says it
COMPILATION_CACHE = Path('~/.cache/mla-lab/xla')


def define_config(command: str) -> flags.FlagHolder:
  """The --config flag; `command` shows a use of it in --help."""
  return config_flags.DEFINE_config_file('config', None, f'a config file, e.g. {command}')


def config_name() -> str:
  """The name of the --config file, which names its default workdir."""
  return Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
  """Parses the flags, calls main, and exits with its code (None is 0).

  A UserError ends in one line on stderr and exit code 2, Diverged likewise with 1.
  """
  argv = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)
  logging.use_absl_handler()
  try:
    _parse(argv)
    jax.config.update('jax_compilation_cache_dir', str(COMPILATION_CACHE.expanduser()))
    sys.exit(main() or 0)
  except UserError as error:
    sys.exit(_complain(error, EXIT_USER_ERROR))
  except Diverged as error:
    sys.exit(_complain(error, EXIT_FAILED))


def _complain(error: Exception, code: int) -> int:
  print('error:', ' '.join(str(error).split()), file=sys.stderr)
  return code


def _parse(argv: list[str]) -> None:
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    raise UserError(_unknown_field(argv, error)) from error
  except (flags.Error, OSError, SyntaxError, ImportError, TypeError, ValueError) as error:
    # The library's message opens with a sentence of its own and ends with the reason.
    lines = [line.strip() for line in str(error).splitlines()]
    raise UserError(f'{lines[0]} {lines[-1]}' if len(lines) > 1 else lines[0]) from error
  if len(rest) > 1:
    raise UserError(f'{rest[1]}: not a flag; flags are written --name=value')


def _unknown_field(argv: list[str], error: Exception) -> str:
  """ml_collections only says "'nums'": names the flag, and the field that was meant."""
  wrong = str(error).strip('\'"')
  given = next((arg for arg in argv if arg.startswith('--config.') and wrong in arg), None)
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  if given is None or config is None:
    return f'--config: {error}; give a file such as configs/mla_small.py'
  names = [
    name if child is None else f'{name}.{child}'
    for name, value in config.items()
    for child in (value if hasattr(value, 'keys') else [None])
  ]
  asked = given.removeprefix('--config.').split('=')[0]
  close = difflib.get_close_matches(asked, names, n=1)
  hint = f'did you mean {close[0]}?' if close else 'see configs/base.py for the fields there are'
  return f'--config.{asked}: no such field; {hint}'


def check_writable(flag: str, given: str | None, endings: tuple[str, ...] = ()) -> None:
  """Raises UserError, before any work is done, unless the output file of --flag can be written."""
  if given is None:
    return
  path = Path(given)
  if path.is_dir() or not path.parent.is_dir():
    raise UserError(f'--{flag}={given}: not a file in a folder that exists; choose another')
  if endings and path.suffix not in endings:
    raise UserError(f'--{flag}={given}: the name must end in {", ".join(endings)}')
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise UserError(f'--{flag}={given}: no right to write there; choose another')
