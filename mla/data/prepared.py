"""A TFDS dataset as it lies prepared on disk: what it has, and the texts of a split or a slice.

It is read as array_record, without TensorFlow and without the dataset's own code. What is damaged,
of the wrong type or not there ends in one line that says what to run.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from mla import files
from mla.errors import UserError, first_line

BLOCK = 256  # records read at once
EXAMPLES = 'write it like train, train[:90%], train[90%:] or train[:1000]'


class NotWhole(UserError):
  """The dataset is not there, or is damaged: one that is only a cache can be made again."""


class Prepared:
  """NAME, NAME/CONFIG or either with :VERSION, below the folder `root`.

  Raises NotWhole if it is not there or its description is broken, UserError for no such name.
  """

  def __init__(self, name: str, root: Path):
    if not re.fullmatch(r'[\w-]+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?', name) or '..' in name:
      raise UserError(
        f'data.dataset={name}: not a dataset name; write NAME, NAME/CONFIG or NAME:1.0.0'
      )
    self.name = name
    self._run = f'run: tfds build {name} --file_format=array_record --data_dir={root}'
    self._run += " (needs a network, and pip install -e '.[tfds-build]' in a venv of its own)"
    self._folder = self._find(root)
    self._cure = f'make it readable, or remove {self._folder} and {self._run}'
    self._builder = self._open()
    self._info = self._builder.info
    self.sizes = {split: self._info.splits[split].num_examples for split in self._info.splits}

  def _find(self, root: Path) -> Path:
    name, _, version = self.name.partition(':')
    try:
      with contextlib.suppress(FileNotFoundError):
        os.listdir(root)
        os.listdir(root / name)
    except OSError as error:
      doing = f'data.data_dir={root}: {name} cannot be looked for there'
      raise files.cannot(doing, error, 'choose a folder of prepared datasets') from error
    found = sorted(
      (root / name).glob(f'{version or "*"}/dataset_info.json'),
      key=lambda path: [int(part) for part in re.findall(r'\d+', path.parent.name)],
    )
    if not found:
      raise NotWhole(f'data.dataset={self.name}: not prepared in {root}; {self._run}')
    return found[-1].parent

  def _open(self) -> tfds.core.DatasetBuilder:
    try:
      for name in ('dataset_info.json', 'features.json'):
        files.read_json(self._folder / name, self._cure)
      return tfds.builder_from_directory(str(self._folder))
    except UserError as error:
      raise NotWhole(str(error)) from error
    except Exception as error:  # whatever a wrong description makes TFDS raise
      raise NotWhole(
        f'{self._folder}: its dataset_info.json or features.json describes no dataset '
        f'({first_line(error)}); {self._cure}'
      ) from error

  @property
  def features(self) -> dict:
    """The features by name; empty where the dataset's examples have no names."""
    found = self._info.features
    return dict(found) if isinstance(found, tfds.features.FeaturesDict) else {}

  def records(self, field: str, wanted: str) -> list[tuple[str, int, int]]:
    """The records that `train`, `train[90%:]` and the like mean: (split on disk, first, end).

    UserError that names the config's field, unless there are any.
    """
    base = wanted.partition('[')[0]
    if '+' not in base and base not in self.sizes:
      there = ', '.join(sorted(self.sizes)) or 'none'
      raise UserError(f'{field}: {self.name} has no split {base!r}; there are: {there}')
    try:
      parts = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(self._info.splits)
    except Exception as error:  # what TFDS finds wrong with it
      raise UserError(f'{field}={wanted}: {first_line(error)}; {EXAMPLES}') from error
    found = [
      (part.splitname, part.from_ or 0, self.sizes[part.splitname] if part.to is None else part.to)
      for part in parts
    ]
    if any(first >= end for _, first, end in found):
      raise UserError(f'{field}={wanted}: holds no record of {self.name}; {EXAMPLES}')
    return found

  def check_text(self, key: str) -> None:
    """Raises UserError unless the feature `key` is a text."""
    if key not in self.features:
      there = ', '.join(sorted(self.features)) or 'no names'
      raise UserError(f'data.text_key={key}: {self.name} has the features {there}')
    if not isinstance(self.features[key], tfds.features.Text):
      raise UserError(f'data.text_key={key}: is not a text of {self.name}')

  def files(self, field: str, wanted: str) -> list[Path]:
    """Those that hold the records which `wanted` means, and those that describe them."""
    names = {name for name, _, _ in self.records(field, wanted)}
    shards = [path for name in sorted(names) for path in self._info.splits[name].filepaths]
    return [self._folder / 'features.json', *(Path(str(path)) for path in shards)]

  def texts(
    self, field: str, wanted: str, key: str, told: Callable[[float], None] = lambda share: None
  ) -> Iterator[bytes]:
    """The texts under the feature `key` of the records that `wanted` means, in their order.

    told() hears which share of them is behind.
    """
    self.check_text(key)
    for split in {name for name, _, _ in self.records(field, wanted)}:
      self._check_shards(split)
    try:
      source = self._builder.as_data_source(split=wanted)
      for start in range(0, len(source), BLOCK):
        told(start / len(source))
        block = source.__getitems__(range(start, min(start + BLOCK, len(source))))
        yield from (self._encoded(example[key], key) for example in block)
    except NotImplementedError as error:
      raise UserError(
        f'data.dataset={self.name}: is not prepared as array_record; {self._run}'
      ) from error
    except UserError:
      raise
    except Exception as error:  # whatever broken records make the libraries raise
      raise self._unreadable(error) from error

  def _encoded(self, text: bytes | str, key: str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    try:
      raw.decode()
    except UnicodeDecodeError as error:
      raise UserError(
        f'data.text_key={key}: {self.name} has text that is not UTF-8; prepare it anew'
      ) from error
    return raw

  def _check_shards(self, split: str) -> None:
    """Raises unless every file of the split is there and has as many records as described."""
    if self._info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      return  # reading will say so
    info = self._info.splits[split]
    for path, count in zip(map(str, info.filepaths), info.shard_lengths, strict=True):
      try:
        if os.path.exists(path) and not os.path.isfile(path):
          raise NotWhole(f'{path}: is not a regular file; {self._cure}')
        open(path, 'rb').close()
        found = array_record_module.ArrayRecordReader(path).num_records()
      except FileNotFoundError as error:
        raise NotWhole(f'{path}: is missing; {self._cure}') from error
      except OSError as error:
        raise files.cannot(f'{path}: cannot be read', error, self._cure) from error
      except RuntimeError as error:  # array_record's, of broken records
        raise self._unreadable(error) from error
      if found != count:
        raise NotWhole(f'{path}: has {found} records where {count} are described; {self._cure}')

  def _unreadable(self, error: Exception) -> Exception:
    """What to raise where records cannot be read: damage, or a limit that only the words name."""
    doing = f'data.dataset={self.name}: its records in {self._folder} cannot be read'
    for number in files.EXHAUSTED:
      if os.strerror(number) in str(error):
        return files.cannot(doing, OSError(number, os.strerror(number)), self._cure)
    return NotWhole(f'{doing}; {self._cure}')
