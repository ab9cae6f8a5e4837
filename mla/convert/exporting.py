"""A run in the layout of transformers: config, weights, generation settings and tokenizer."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mla import files, generate
from mla import model as model_lib
from mla.checkpoint import flatten
from mla.convert import configs, layouts, vocabulary
from mla.convert.importing import draft_of
from mla.convert.sources import dumps, library
from mla.errors import UserError

SHARD = 5 * 10**9  # bytes of one file, as transformers splits them


def export(
  workdir: Path, out: Path, kind: str, latent_dim: int | None = None, shard: int = SHARD
) -> str:
  """Writes the newest checkpoint of the run at `workdir` to the new folder `out`; returns the kind.

  kind is one of configs.FORMATS[config.attention], or 'auto' for the first. A nested latent is cut
  to latent_dim first. Weights are float32, as ours are. UserError that names the field the format
  has no word for; then nothing is written.
  """
  run = generate.load(workdir, latent_dim)
  config = run.config
  able = configs.FORMATS.get(config.attention, ())
  if not able:
    raise UserError(f'attention={config.attention}: no format of transformers has it')
  kind = able[0] if kind == 'auto' else kind
  if kind not in able:
    raise UserError(
      f'--format={kind}: {config.attention} is written as {" or ".join(able)}, or auto'
    )
  tokenizer, model = run.tokenizer, run.model
  config = run.config.copy_and_resolve_references()
  config.ffn_dim = model.blocks.ffn.w_gate.shape[-1]
  their = configs.to_theirs(config, kind, tokenizer.vocab_size, tokenizer.bos)
  with draft_of(out, 'out') as draft:
    files.write_whole(draft / 'config.json', dumps(their))
    generation = {key: their[key] for key in ('bos_token_id', 'eos_token_id')}
    files.write_whole(draft / 'generation_config.json', dumps(generation))
    for name, text in vocabulary.to_files(tokenizer).items():
      files.write_whole(draft / name, text)
    tensors = layouts.tensors(config, tokenizer.vocab_size, interleaved=kind != 'llama')
    params = _only_tokens(model)
    del run, model  # of whose arrays none is to stay beyond its last tensor
    _write(draft, list(tensors), params, shard)
  return kind


def _only_tokens(model: model_lib.Decoder) -> dict[str, jax.Array]:
  """The weights by their paths, without the rows that round the vocabulary; uses up the model."""
  params = flatten(nnx.state(model, nnx.Param))
  for name, axis in (('embedding/value', 0), ('w_out/value', 1)):
    if name in params and params[name].shape[axis] > model.vocab:
      whole = params[name]
      params[name] = jax.lax.slice_in_dim(whole, 0, model.vocab, axis=axis)
      whole.delete()
  return params


def _write(folder: Path, tensors: list[layouts.Tensor], params: dict, shard: int) -> None:
  """The weights, one file after another; more than one come with an index of them.

  `params` is used up: a stack of layers' weights goes with the last tensor that is taken from it.
  It is deleted, not left to Python: Flax holds the arrays of a state in a cycle of references, in
  which they would stay until the collector happens to come.
  """
  groups: list[list[layouts.Tensor]] = [[]]
  size = 0
  for tensor in tensors:
    nbytes = 4 * int(np.prod(tensor.shape))
    if groups[-1] and size + nbytes > shard:
      groups.append([])
      size = 0
    groups[-1].append(tensor)
    size += nbytes
  save = library('safetensors.numpy').save_file
  uses = Counter(path for tensor in tensors for path in tensor.ours)
  table = {}
  for number, group in enumerate(groups, 1):
    single = len(groups) == 1
    name = 'model.safetensors' if single else f'model-{number:05}-of-{len(groups):05}.safetensors'
    packed = {}
    for tensor in sorted(group, key=lambda tensor: tensor.ours):  # a stack after another
      packed[tensor.name] = _packed(tensor, params)
      uses.subtract(tensor.ours)
      for path in tensor.ours:
        if not uses[path]:
          params.pop(f'{path}/value').delete()
    save(packed, folder / name, {'format': 'pt'})
    (folder / name).chmod(0o644)  # as the others; the library lets its owner alone read it
    table.update({tensor.name: name for tensor in group})
  if len(groups) > 1:
    total = sum(4 * int(np.prod(tensor.shape)) for tensor in tensors)
    index = {'metadata': {'total_size': total}, 'weight_map': table}
    files.write_whole(folder / 'model.safetensors.index.json', dumps(index))


def _packed(tensor: layouts.Tensor, params: dict[str, jax.Array]) -> np.ndarray:
  own = [np.asarray(params[f'{path}/value']) for path in tensor.ours]
  own = own if tensor.layer is None else [array[tensor.layer] for array in own]
  # A copy always: what is no more than a view would go with the array it looks at.
  return np.array(tensor.pack(*own), np.float32, order='C')
