"""Builds the C++ part and hands it to XLA.

Built at first use by the system's C++ compiler (c++, or what CXX names), for this machine's
processor, and kept in ~/.cache/mla-lab/native.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

SOURCES = sorted(Path(__file__).parent.glob('*.cc'))
HEADERS = sorted(Path(__file__).parent.glob('*.h'))
LIBRARIES = Path('~/.cache/mla-lab/native')
FLAGS = '-std=c++17 -O3 -march=native -fno-math-errno -shared -fPIC'.split()
TARGETS = ('mla_causal_forward', 'mla_causal_backward', 'mla_cached_forward', 'mla_append')


@functools.cache
def load() -> bool:
  """Builds and registers the C++ part, once; False where that cannot be. Starts no JAX backend."""
  global failure
  try:
    library = ctypes.CDLL(str(_build()))
  except (OSError, RuntimeError, subprocess.SubprocessError) as error:
    said = (getattr(error, 'stderr', '') or str(error)).strip().splitlines()
    failure = said[0] if said else type(error).__name__
    return False
  for name in TARGETS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  return True


failure = ''  # why load() returned False


def _build() -> Path:
  """The shared library of these sources, compiler and processor; compiled unless it is there."""
  asked = shlex.split(os.environ.get('CXX') or 'c++')  # 'ccache g++'
  if shutil.which(asked[0]) is None:
    raise OSError(f'there is no C++ compiler {asked[0]} on the PATH')
  command = [*asked, *FLAGS, f'-isystem{jax.ffi.include_dir()}']
  sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
  identity = [*command, jax.__version__, _processor(), _run([*asked, '--version']), *sources]
  name = hashlib.sha256('\n'.join(identity).encode()).hexdigest()[:20]
  folder = LIBRARIES.expanduser()
  for library in folder.glob(f'{name}-*.so'):
    if library.name == _named(name, library):
      return library
  folder.mkdir(parents=True, exist_ok=True)
  # Built aside and moved into place whole, as several processes may do this at once.
  with tempfile.TemporaryDirectory(dir=folder) as aside:
    made = Path(aside) / 'made.so'
    objects = [Path(aside) / f'{source.stem}.o' for source in SOURCES]
    jobs = [
      [*command, '-c', source, '-o', object_]
      for source, object_ in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(jobs)) as threads:
      list(threads.map(_run, jobs))
    _run([*command, *objects, '-o', made])
    return made.replace(folder / _named(name, made))


def _named(name: str, library: Path) -> str:
  """The file's name, with its content's hash: a damaged one is not loaded, but made again."""
  return f'{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:20]}.so'


def _run(command: Sequence[str | Path]) -> str:
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
  """What -march=native depends on: a home folder may be shared by unlike machines."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
  return '\n'.join(sorted({line for line in lines if line.startswith(('model', 'flags', 'Feat'))}))
