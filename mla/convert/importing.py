"""A published model becomes a run: its weights a checkpoint, its tokenizer the run's own.

It is a run of no steps. It has no corpus of its own, for nobody else has the text it was trained
on: its data.* name the text that it is evaluated on, the embedded corpus unless config.json is
changed, read with its own tokenizer. It can't be trained on, for it has no optimiser state;
train.py --init_from=W begins another run with its weights.
"""

import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mla import config as config_lib
from mla import files, paths
from mla import model as model_lib
from mla.checkpoint import IMPORTED, Checkpoints, flatten, unflatten
from mla.convert import configs, layouts
from mla.convert.sources import Gguf, Safetensors, Source, dumps, read_config
from mla.convert.vocabulary import TOKENIZER, from_folder, from_gguf
from mla.data.hugging_face import HuggingFaceTokenizer
from mla.errors import UserError

# Tensors that say nothing the config doesn't.
DERIVED = ('rotary_emb.inv_freq',)


def import_folder(folder: Path, base: ConfigDict, workdir: Path) -> ConfigDict:
  """A folder in the layout of transformers (config.json, safetensors, tokenizer.json) as a run.

  Fields that the model doesn't decide are base's. The workdir is made whole or not at all.
  UserError that names the key, tensor or file that does not do.
  """
  found = configs.from_theirs(read_config(folder), base, folder / 'config.json')
  source = Safetensors(folder)
  tokenizer = from_folder(folder, found.vocab)
  return _import(source, found, layouts.TRANSFORMERS, tokenizer, workdir, folder)


def import_gguf(path: Path, base: ConfigDict, workdir: Path) -> ConfigDict:
  """A GGUF file in Llama's layout as a run; as import_folder."""
  source = Gguf(path)
  found = configs.from_theirs(configs.gguf_keys(source.fields, source.shapes, path), base, path)
  # Its converter puts the rotary dims of Llama's queries and keys in pairs.
  found = found._replace(interleaved=True)
  tokenizer = from_gguf(source.fields, found.vocab, path)
  return _import(source, found, layouts.GGUF, tokenizer, workdir, path)


def _import(
  source: Source,
  found: configs.Imported,
  names: layouts.Names,
  tokenizer: dict[str, str],
  workdir: Path,
  origin: Path,
) -> ConfigDict:
  config = found.config
  tensors = list(
    layouts.tensors(config, found.vocab, names, interleaved=found.interleaved, scales=found.scales)
  )
  if config.tie_embeddings and found.scales.embedding != found.scales.out:
    config.tie_embeddings = False  # the two are one up to factors, which ours has in its weights
    *_, out = layouts.tensors(
      config, found.vocab, names, interleaved=found.interleaved, scales=found.scales
    )
    tensors.append(out._replace(name=names.embedding))
  _check_tensors(source, tensors, config, names, origin)
  with draft_of(workdir, 'workdir') as draft:
    for name, text in tokenizer.items():
      files.write_whole(draft / name, text)
    config.data.tokenizer = f'hf:{workdir.absolute() / TOKENIZER}'
    files.write_whole(draft / 'config.json', dumps(config_lib.to_json(config)))
    digest = HuggingFaceTokenizer(draft / TOKENIZER).digest
    run = {
      'config': config_lib.to_json(config),
      'data': IMPORTED,
      'tokenizer': digest,
      'origin': str(origin),
    }
    with Checkpoints(draft) as checkpoints:
      checkpoints.save(0, _assemble(source, tensors, config, found.vocab), None, run)
  return config


def _check_tensors(source, tensors, config, names, origin) -> None:
  """UserError if one is missing, has another shape, or is there and would not be read."""
  for tensor in tensors:
    shape = source.shapes.get(tensor.name)
    if shape is None:
      raise UserError(f'{origin}: lacks {tensor.name}; fetch it again')
    if shape != tensor.shape:
      raise UserError(
        f'{origin}: {tensor.name} is {list(shape)}, where its config gives {list(tensor.shape)}; '
        'fetch both again'
      )
  known = {tensor.name for tensor in tensors}
  known |= {names.out} if names.embedding in known and names.out not in known else set()
  for name in source.shapes:
    if name not in known and not name.endswith(DERIVED):
      raise UserError(f'{origin}: has {name}, for which our {config.attention} has no place')


def _assemble(source: Source, tensors: list[layouts.Tensor], config: ConfigDict, vocab: int):
  """The model's parameters, filled one tensor after another."""
  params = nnx.state(nnx.eval_shape(lambda: model_lib.make_model(config, vocab)), nnx.Param)
  arrays = {path: _aligned(leaf.shape) for path, leaf in flatten(params).items()}
  for tensor in tensors:
    parts = tensor.unpack(source.read(tensor.name))
    for path, part in zip(tensor.ours, parts, strict=True):
      own = arrays[f'{path}/value']
      own[... if tensor.layer is None else tensor.layer] = part
  # Orbax copies numpy's arrays before it writes them. These are the same memory, on a CPU.
  return unflatten(params, {path: jax.device_put(array) for path, array in arrays.items()})


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Memory that JAX takes over without a copy: it wants each array to start at 64 bytes."""
  count = math.prod(shape)
  memory = np.empty(count + 16, np.float32)
  start = -memory.ctypes.data % 64 // 4
  return memory[start : start + count].reshape(shape)


@contextmanager
def draft_of(target: Path, flag: str) -> Iterator[Path]:
  """A new folder beside `target`, which takes its place in one step once the body has ended.

  UserError if something is there already; of a body that fails nothing stays.
  """
  paths.check_workdir(target)
  try:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
      raise UserError(f'--{flag}={target}: is not empty; choose another')
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    draft = target.absolute().parent / f'.{secrets.token_hex(8)}.draft'
    draft.mkdir()
  except OSError as error:
    raise files.cannot(f'--{flag}={target}: cannot be written', error, 'choose another') from error
  try:
    yield draft
    os.rename(draft, target.absolute())
  except OSError as error:
    raise files.cannot(f'--{flag}={target}: cannot be written', error, 'choose another') from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)
