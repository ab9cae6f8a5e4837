"""Files of many documents: .jsonl, also .gz and .zst, and parquet, read record by record.

A document is the text under data.text_key; one of white space only is left out. It is taken as it
stands, NUL and Windows line ends included. What is damaged, not UTF-8, or without such a text is
refused in one line that names file and record.
"""

import codecs
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mla import files
from mla.data.documents import Raw, is_blank
from mla.errors import UserError, first_line

JSON_LINES = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
PARQUET = '.parquet'


def is_records(path: Path) -> bool:
  """Whether a file is one of records, by its name."""
  return path.name.lower().endswith((*JSON_LINES, PARQUET))


def read(field: str, path: Path, key: str, told: Callable[[int], None]) -> Iterator[Raw | None]:
  """Each record's document, None for a blank one; told(n): so many bytes of the file are read."""
  reader: Callable[..., Iterator[str | bytes]] = _json_lines
  if path.name.lower().endswith(PARQUET):
    reader = _parquet
  for number, text in enumerate(reader(field, path, key, told), 1):
    try:
      if isinstance(text, bytes):
        text.decode()
      raw = text if isinstance(text, bytes) else text.encode()
      yield None if is_blank(raw) else raw
    except UnicodeError as error:
      raise UserError(
        f'{field}: {path} has text that is not UTF-8 in record {number}; convert it or leave it out'
      ) from error


def _json_lines(field: str, path: Path, key: str, told: Callable[[int], None]) -> Iterator[str]:
  cure = f'restore it or leave it out of {field}'
  number = 0
  try:
    with open(path, 'rb') as file, _unpacked(field, path, file) as lines:
      for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
          continue
        told(file.tell())
        try:
          record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
          reason = 'is not UTF-8' if isinstance(error, UnicodeDecodeError) else 'is no JSON'
          raise UserError(f'{field}: {path} {reason} in line {number}; {cure}') from error
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
          raise _no_text(path, f'line {number}', key, record)
        yield text
  except OSError as error:
    if isinstance(error, gzip.BadGzipFile):
      raise _damaged(field, path, number, error, cure) from error
    raise files.cannot(f'{path}: cannot be read', error, cure) from error
  except (EOFError, zlib.error) as error:
    raise _damaged(field, path, number, error, cure) from error


def _unpacked(field: str, path: Path, file: Any) -> Any:
  name = path.name.lower()
  if name.endswith('.gz'):
    return gzip.open(file)
  if name.endswith('.zst'):
    try:
      zstandard = importlib.import_module('zstandard')
    except ModuleNotFoundError as error:
      raise UserError(
        f"{field}: {path} needs the package zstandard; pip install -e '.[text]'"
      ) from error
    return io.BufferedReader(_Zstandard(zstandard, file))
  return io.BufferedReader(file, 2**20)


class _Zstandard(io.RawIOBase):
  """A .zst file's content; a damaged one, or one that is cut short, is an EOFError, as of gzip."""

  def __init__(self, library: Any, file: Any):
    self._library, self._file = library, file
    self._frame: Any = None  # the one being read
    self._unread, self._ready = b'', b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      packed = self._unread or self._file.read(2**17)
      if not packed:
        if self._frame is not None:
          raise EOFError('it ends in the middle')
        return 0
      self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
      try:
        self._ready = self._frame.decompress(packed)
      except self._library.ZstdError as error:
        raise EOFError(first_line(error)) from error
      self._unread = self._frame.unused_data
      self._frame = None if self._frame.eof else self._frame
    count = min(len(buffer), len(self._ready))
    buffer[:count], self._ready = self._ready[:count], self._ready[count:]
    return count


def _parquet(field: str, path: Path, key: str, told: Callable[[int], None]) -> Iterator[bytes]:
  import pyarrow
  import pyarrow.parquet

  cure = f'restore it or leave it out of {field}'
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
      if key not in file.schema_arrow.names:
        raise _no_text(path, 'the table', key, dict.fromkeys(file.schema_arrow.names))
      rows, size = file.metadata.num_rows, path.stat().st_size
      for batch in file.iter_batches(batch_size=256, columns=[key], use_threads=False):
        told(size * number // max(rows, 1))
        try:
          texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
        except pyarrow.ArrowNotImplementedError:  # neither text nor bytes
          texts = batch.column(0).to_pylist()
        for text in texts:
          number += 1
          if not isinstance(text, bytes):
            raise _no_text(path, f'record {number}', key, {key: text})
          yield text
  except pyarrow.ArrowException as error:
    raise _damaged(field, path, number, error, cure) from error
  except OSError as error:
    if error.errno is None:  # Arrow's, of broken content
      raise _damaged(field, path, number, error, cure) from error
    raise files.cannot(f'{path}: cannot be read', error, cure) from error


def _damaged(field: str, path: Path, number: int, error: Exception, cure: str) -> UserError:
  return UserError(
    f'{field}: {path} is damaged after record {number} ({first_line(error)}); {cure}'
  )


def _no_text(path: Path, where: str, key: str, record: Any) -> UserError:
  there = ', '.join(map(str, record)) if isinstance(record, dict) else f'no names but {record!r}'
  if isinstance(record, dict) and key in record:
    there = f'{record[key]!r} there'
  return UserError(f'data.text_key={key}: no such text in {where} of {path}; it has {there[:200]}')
