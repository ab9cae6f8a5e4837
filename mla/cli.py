"""What the entry points share: flags, output, the compilation cache, and errors of one line.

An entry point defines its flags, calls begin(), and only then imports what takes seconds: JAX and
all that needs it. So this file imports none of that either.
"""

import difflib
import errno
import io
import logging
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import absl.logging
from absl import flags
from ml_collections import ConfigDict, config_flags

from mla import fields as fields_lib
from mla import files, help, paths, signals
from mla.errors import Diverged, MachineError, UserError, first_line

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
COMPILATION_CACHE = Path('~/.cache/mla-lab/xla')
HELP = re.compile(r'--?(h|help|helpshort|helpfull)')
LONGEST_ERROR, ITS_END = 800, 300  # characters; the cure stands at the end

# ml_collections reads the command line by itself, already where the flag is defined, and there an
# error in a --flagfile would be a traceback. So it reads this, which _parse fills.
_command_line: list[str] = []
_bases: list[ModuleType] = []  # configs/base.py, where the entry point takes a config


def define_config(command: str, base: ModuleType) -> flags.FlagHolder:
  """The --config flag; in --help `command` shows a use, and configs/base.py what its fields are."""
  _bases[:] = [base]
  what = f'a config file, e.g. {command}; --config.FIELD=VALUE after it sets a field'
  return config_flags.DEFINE_config_file('config', None, what, sys_argv=_command_line)


def config_name() -> str:
  """The name of the --config file, which names its default workdir."""
  return Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem


def which_config() -> UserError:
  """The error for a command that lacks its config: those there are."""
  names = sorted(path.stem for path in Path('configs').glob('*.py'))
  there = ', '.join(name for name in names if name not in ('base', '__init__'))
  told = f'configs/ has {there}; ' if there else ''
  return UserError(f'--config: which? {told}e.g. --config=configs/mla_small.py')


def begin(argv: list[str] | None = None, say: str = '') -> None:
  """Answers --help, or parses the flags; ends as run() does. Then says `say` on a terminal."""
  argv = sys.argv if argv is None else argv
  _keep_output_open()
  log_plainly()
  asked = next((match[1] for match in map(HELP.fullmatch, argv[1:]) if match), None)
  if asked is not None:
    print(flags.FLAGS.get_help() if asked == 'helpfull' else _help())
    sys.exit(0)
  _with_its_errors_told(lambda: _parse(argv))
  if say and sys.stdout.isatty():
    print(say, flush=True)


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
  """Calls main, after begin() if that has not been called, and exits with its code (None is 0).

  A UserError ends in one line on stderr and exit code 2, Diverged and MachineError likewise with 1;
  Ctrl-C, where nothing is there to be saved, ends quietly with 130.
  """
  if argv is not None or not flags.FLAGS.is_parsed():
    begin(argv)
  log_plainly()
  use_compilation_cache()
  sys.exit(_with_its_errors_told(main) or 0)


def _with_its_errors_told(work: Callable[[], int | None]) -> int | None:
  try:
    return work()
  except KeyboardInterrupt:
    sys.exit(signals.exit_code(signal.SIGINT))
  except Exception as error:
    ours = _in_our_words(error)
    if isinstance(ours, UserError):
      sys.exit(_complain(ours, EXIT_USER_ERROR))
    if isinstance(ours, Diverged | MachineError):
      sys.exit(_complain(ours, EXIT_FAILED))
    raise


def log_plainly() -> None:
  """Our own warnings as plain lines; what the libraries log as errors, they also raise."""
  # By force, as some library logs while it is imported, which sets up a format of its own.
  logging.basicConfig(format='warning: %(message)s', level=logging.WARNING, force=True)
  absl.logging.set_verbosity(absl.logging.FATAL)
  # A compiled program that cannot be kept, or read, is compiled again.
  warnings.filterwarnings('ignore', '.*persistent compilation cache entry')
  # Where one of Orbax' reads or writes fails, which it raises, the others protest as they go.
  sys.unraisablehook = lambda what: None
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)


def use_compilation_cache() -> None:
  """Keeps what XLA compiles in COMPILATION_CACHE, unless the environment names another place."""
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(COMPILATION_CACHE.expanduser()))


class _Outlet(io.FileIO):
  """A descriptor that may stop taking what is written, which then goes nowhere.

  A reader has left (`| head`) or a terminal has gone, for good; or the disk of a log is full, which
  may pass.
  """

  def write(self, data) -> int:
    try:
      return super().write(data)
    except OSError as error:
      if error.errno in (errno.EPIPE, errno.EIO):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
      elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      return memoryview(data).nbytes


def _keep_output_open() -> None:
  """What is printed never ends a run: not for a reader that left, nor for a terminal's alphabet."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:  # closed by whoever started us
      setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
      continue
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's
      continue
    stream.flush()
    setattr(
      sys,
      name,
      io.TextIOWrapper(
        io.BufferedWriter(_Outlet(stream.fileno(), 'w', closefd=False)),
        encoding=stream.encoding,
        errors='backslashreplace',
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
      ),
    )


def _in_our_words(error: Exception) -> Exception:
  """What a library's error comes down to for the user; the error itself where it says nothing."""
  if isinstance(error, UserError | MachineError | Diverged):
    return error
  import jax

  exhausted = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)
  if exhausted or isinstance(error, MemoryError):
    return MachineError(
      f'there is too little memory ({first_line(error)}); lower batch_size or seq_len, raise '
      'accumulation_steps, or set remat=full'
    )
  if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized():
    return MachineError(
      f'another process of the run is no longer there ({first_line(error)}); start all of them '
      'again, and they go on from the last checkpoint'
    )
  if isinstance(error, OSError) and (error.filename or error.errno in files.EXHAUSTED):
    name = error.filename2 or error.filename  # the second is the place of what was to be moved
    where = os.fsdecode(name) if name else 'a file'
    return files.cannot(f'{where}: cannot be used', error, 'mend that, then run the same again')
  return error


def _complain(error: Exception, code: int) -> int:
  print('error:', one_line(str(error)), file=sys.stderr)
  return code


def one_line(text: str) -> str:
  """A message as one line of bounded length, with what a terminal would obey written out."""
  line = ' '.join(text.split())
  line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)
  if len(line) > LONGEST_ERROR:
    line = f'{line[: LONGEST_ERROR - ITS_END]} ... {line[-ITS_END:]}'
  return line


def _parse(argv: list[str]) -> None:
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  except (flags.Error, ValueError, RecursionError) as error:
    raise UserError(f'--flagfile: cannot be read ({_reason(error)})') from error
  _command_line[:] = _check_config_flags(argv)
  try:
    rest = flags.FLAGS(_command_line)
  except flags.UnrecognizedFlagError as error:
    raise _unknown_flag(error.flagname) from error
  except (flags.Error, TypeError, ValueError, AttributeError) as error:
    raise UserError(_reason(error)) from error
  if len(rest) > 1:
    raise UserError(f'{rest[1]}: not a flag; flags are written --name=value')


def _own_flags() -> list[flags.Flag]:
  """The entry point's, in the order of its file."""
  by_module = flags.FLAGS.flags_by_module_dict()
  own = by_module.get(sys.argv[0], []) + by_module.get('__main__', [])
  config = [flags.FLAGS['config']] if 'config' in flags.FLAGS else []
  return list({flag.name: flag for flag in (*config, *own)}.values())


def _help() -> str:
  base = _bases[0] if _bases else None
  return help.text(sys.modules['__main__'].__doc__ or '', _own_flags(), base)


def _unknown_flag(name: str) -> UserError:
  own: Iterable[str] = (flag.name for flag in _own_flags())
  close = difflib.get_close_matches(name.split('.')[0], own, n=1)
  hint = f'did you mean --{close[0]}?' if close else '--help shows those there are'
  return UserError(f'--{name}: no such flag; {hint}')


def _reason(error: Exception) -> str:
  """A library's message, which opens with a sentence of its own and ends with the reason."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['no reason given']
  told = f'{lines[0]} {lines[-1]}' if len(lines) > 1 else lines[0]
  for kind, wanted in (
    ('invalid literal for int', 'a whole number'),
    ('could not convert', 'a number'),
  ):
    told = re.sub(f': {kind}.*', f': must be {wanted}', told)
  return told


def _check_config_flags(argv: list[str]) -> list[str]:
  """argv with one --config, the last as with any flag, where the first stood; ~ in it replaced.

  Raises UserError unless it comes before the fields, is a config file and has every field that is
  set. ml_collections takes a missing file for an empty config, a second one for a mistake, and says
  "'nums'" of an unknown field.
  """
  others: list[str] = []
  given: list[tuple[int, str]] = []  # place in others, path
  fields: list[tuple[int, str]] = []  # place in others, argument
  rest = iter(argv)
  for arg in rest:
    name, equals, value = arg.partition('=')
    if re.fullmatch('--?config', name):
      given.append((len(others), value if equals else next(rest, '')))
      continue
    if re.match(r'--?(no)?config\.', arg):
      fields.append((len(others), arg))
    others.append(arg)
  if fields and not (given and given[0][0] <= fields[0][0]):
    raise UserError(f'{fields[0][1]}: comes before the config it sets; give --config=FILE first')
  if not given:
    return argv
  path = str(paths.source('config', given[-1][1], 'configs/mla_small.py'))
  known = list(fields_lib.flatten(load_config(path)))
  for asked in (arg.split('.', 1)[1].split('=')[0] for _, arg in fields):
    if asked not in known:
      raise UserError(f'--config.{fields_lib.unknown_field(asked, known)}')
  place = given[0][0]
  return [*others[:place], f'--config={path}', *others[place:]]


def load_config(path: str) -> ConfigDict:
  """What get_config() of a config file returns; UserError if that is no config."""
  try:
    config = runpy.run_path(path)['get_config']()
  except (Exception, SystemExit) as error:  # whatever a file that is no config raises
    reason = f'{type(error).__name__}: {error}'
    raise UserError(f'--config={path}: no get_config() can be run there ({reason})') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'--config={path}: its get_config() returns no ConfigDict; see configs/base.py')
  return config
