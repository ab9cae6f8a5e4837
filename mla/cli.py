"""What the entry points share: flags, the compilation cache, and errors of one line."""

import difflib
import itertools
import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import absl.logging
import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from mla import signals
from mla.errors import Diverged, MachineError, UserError

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
COMPILATION_CACHE = Path('~/.cache/mla-lab/xla')


def define_config(command: str) -> flags.FlagHolder:
  """The --config flag; `command` shows a use of it in --help."""
  return config_flags.DEFINE_config_file('config', None, f'a config file, e.g. {command}')


def config_name() -> str:
  """The name of the --config file, which names its default workdir."""
  return Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
  """Parses the flags, calls main, and exits with its code (None is 0).

  A UserError ends in one line on stderr and exit code 2, Diverged and MachineError likewise with 1;
  Ctrl-C, where nothing is there to be saved, ends quietly with 130.
  """
  argv = sys.argv if argv is None else argv
  log_plainly()
  try:
    _parse(argv)
    use_compilation_cache()
    sys.exit(main() or 0)
  except UserError as error:
    sys.exit(_complain(error, EXIT_USER_ERROR))
  except (Diverged, MachineError) as error:
    sys.exit(_complain(error, EXIT_FAILED))
  except KeyboardInterrupt:
    sys.exit(signals.exit_code(signal.SIGINT))


def log_plainly() -> None:
  """Our own warnings as plain lines; what the libraries log as errors, they also raise."""
  logging.basicConfig(format='warning: %(message)s', level=logging.WARNING)
  absl.logging.set_verbosity(absl.logging.FATAL)


def use_compilation_cache() -> None:
  """Keeps what XLA compiles in COMPILATION_CACHE, unless the environment names another place."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(COMPILATION_CACHE.expanduser()))


def _complain(error: Exception, code: int) -> int:
  print('error:', ' '.join(str(error).split()), file=sys.stderr)
  return code


def _parse(argv: list[str]) -> None:
  _check_fields(argv)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, TypeError, ValueError) as error:
    # The library's message opens with a sentence of its own and ends with the reason.
    lines = [line.strip() for line in str(error).splitlines()]
    raise UserError(f'{lines[0]} {lines[-1]}' if len(lines) > 1 else lines[0]) from error
  if len(rest) > 1:
    raise UserError(f'{rest[1]}: not a flag; flags are written --name=value')


def _check_fields(argv: list[str]) -> None:
  """Raises UserError unless --config is a config file and has every field that is set.

  ml_collections takes a missing file for an empty config, and says "'nums'" of an unknown field.
  """
  given = [arg.removeprefix('--config=') for arg in argv if arg.startswith('--config=')]
  given += [value for arg, value in itertools.pairwise(argv) if arg == '--config']
  fields = [arg for arg in argv if arg.startswith('--config.')]
  if not given:
    return
  names = {
    name if child is None else f'{name}.{child}'
    for name, value in load_config(given[-1]).items()
    for child in (value if isinstance(value, ConfigDict) else [None])
  }
  for asked in (arg.removeprefix('--config.').split('=')[0] for arg in fields):
    if asked not in names:
      close = difflib.get_close_matches(asked, names, n=1)
      hint = f'did you mean {close[0]}?' if close else 'see configs/base.py for those there are'
      raise UserError(f'--config.{asked}: no such field; {hint}')


def load_config(path: str) -> ConfigDict:
  """What get_config() of a config file returns; UserError if that is no config."""
  if not Path(path).is_file():
    raise UserError(f'--config={path}: no such file; give one such as configs/mla_small.py')
  try:
    config = runpy.run_path(path)['get_config']()
  except Exception as error:  # whatever a file that is no config raises
    reason = f'{type(error).__name__}: {error}'
    raise UserError(f'--config={path}: no get_config() can be run there ({reason})') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'--config={path}: its get_config() returns no ConfigDict; see configs/base.py')
  return config


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
