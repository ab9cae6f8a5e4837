"""Where tensors come from: a folder of safetensors, or a GGUF file. Nothing is ever unpickled.

A source says what it has, by name and shape, before any value is read, and gives one tensor at a
time, in float32 whatever it is kept in. A file that is cut off or of another kind is a UserError.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mla import files
from mla.errors import UserError, first_line

KINDS = ('F32', 'BF16', 'F16', 'F64')
NO_PICKLE = 'it may hold code; save it as safetensors'


def library(name: str) -> ModuleType:
  """A library of the extra [convert]; UserError if it is not installed."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name != name.split('.')[0]:
      raise
    raise UserError(
      f"convert: needs the package {error.name}; pip install -e '.[convert]'"
    ) from error


class Safetensors:
  """A folder's model.safetensors, or the shards that its model.safetensors.index.json names."""

  def __init__(self, folder: Path):
    self._folder = folder
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._files: dict[str, Path] = {}
    self._kinds: dict[str, str] = {}
    for path in self._shards():
      with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
          part = file.get_slice(name)
          if name in self.shapes:
            raise UserError(f'{path}: has {name}, which another shard has too; fetch it again')
          self.shapes[name] = tuple(part.get_shape())
          self._files[name], self._kinds[name] = path, str(part.get_dtype())

  def _shards(self) -> list[Path]:
    index, whole = (
      self._folder / name for name in ('model.safetensors.index.json', 'model.safetensors')
    )
    if whole.exists():
      return [whole]
    if not index.exists():
      pickled = sorted(self._folder.glob('*.bin')) + sorted(self._folder.glob('*.pt*'))
      if pickled:
        raise UserError(f'{pickled[0]}: is a pickle and is not opened, for {NO_PICKLE}')
      raise UserError(f'{self._folder}: has no model.safetensors; name a folder that has')
    cure = 'fetch it again'
    found = files.read_json(index, cure)
    table = found.get('weight_map') if isinstance(found, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
      raise UserError(f'{index}: has no weight_map; {cure}')
    names = sorted(set(table.values()))
    for name in names:
      if name != Path(name).name or not name.endswith('.safetensors'):
        raise UserError(f'{index}: names {name!r}, which is no safetensors file beside it; {cure}')
      if not (self._folder / name).exists():
        raise UserError(f'{self._folder / name}: is missing; {cure}')
    return [self._folder / name for name in names]

  def read(self, name: str) -> np.ndarray:
    path, kind = self._files[name], self._kinds[name]
    if kind not in KINDS:
      raise UserError(
        f'{path}: {name} is kept as {kind}, which is not read; convert it to one of '
        f'{", ".join(KINDS)}'
      )
    with _opened(path) as file:
      try:
        values = file.get_tensor(name)
      except Exception as error:  # its own class, of no common kind
        raise UserError(
          f'{path}: {name} cannot be read ({first_line(error)}); fetch it again'
        ) from error
    return np.asarray(values).astype(np.float32, copy=False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """A safetensors file. pread: what is mapped would count as this process's memory."""
  safetensors = library('safetensors')
  if path.exists() and not path.is_file():
    raise UserError(f'{path}: is not a regular file; name a folder of safetensors')
  try:
    opened = safetensors.safe_open(str(path), framework='np')
  except OSError as error:
    raise files.cannot(f'{path}: cannot be read', error, 'make it readable') from error
  except Exception as error:  # SafetensorError: cut off, or another kind of file
    raise UserError(
      f'{path}: is no whole safetensors file ({first_line(error)}); fetch it again'
    ) from error
  with opened as file:
    yield file


class Gguf:
  """A GGUF file's tensors, whatever they are quantised to, and its fields."""

  def __init__(self, path: Path):
    self._path = path
    self._gguf = library('gguf')
    try:
      with path.open('rb') as file:
        if file.read(4) != b'GGUF':
          raise UserError(f'{path}: is no GGUF file; name one that is')
      reader = self._gguf.GGUFReader(path)
      self.fields = {name: field.contents() for name, field in reader.fields.items()}
      self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    except OSError as error:
      raise files.cannot(f'{path}: cannot be read', error, 'make it readable') from error
    except UserError:
      raise
    except Exception as error:  # of many kinds, where it is cut off
      raise UserError(
        f'{path}: is no whole GGUF file ({first_line(error)}); fetch it again'
      ) from error
    self.shapes = {
      name: tuple(int(size) for size in tensor.shape[::-1])
      for name, tensor in self._tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise UserError(
        f'{self._path}: {name} is kept as {tensor.tensor_type.name}, which is not read; take '
        'another quantisation'
      ) from error
    return values.astype(np.float32, copy=False)


Source = Safetensors | Gguf


def read_config(folder: Path) -> dict[str, Any]:
  """A folder's config.json."""
  path = folder / 'config.json'
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder; nothing is downloaded, so fetch the model first')
  if not path.exists():
    raise UserError(f'{folder}: has no config.json; name the folder of a model')
  found = files.read_json(path, 'fetch it again')
  if not isinstance(found, dict):
    raise UserError(f'{path}: is no JSON object; fetch it again')
  return found


def dumps(value: Any) -> str:
  return json.dumps(value, indent=2) + '\n'
