"""A run that starts with another's weights: train.py --init_from=W.

Data, schedule and optimiser are its own and new; only weights are taken, and they must fit as they
are. init_from.json in the workdir says whose they were, so that a run that is stopped before its
first checkpoint begins with the same again.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mla import config as config_lib
from mla import files
from mla.checkpoint import Checkpoints, flatten
from mla.errors import UserError
from mla.workdir import read_config

RECORD = 'init_from.json'
# No weight's shape shows these, but another value makes another model of it.
UNSEEN = 'attention nested rope_base rope_dim rope_scaling norm_eps'.split()


def settle(workdir: Path, asked: Path | None, *, begun: bool) -> str | None:
  """Whose weights the run of this workdir starts with: those asked for, or those it has noted.

  `begun` says that it has a checkpoint; before, another may be asked for. UserError if it started
  otherwise than is asked now.
  """
  path = workdir / RECORD
  noted: Path | None = None
  if os.path.lexists(path):
    found = files.read_json(path, 'restore it')
    if not isinstance(found, dict) or not isinstance(found.get('workdir'), str):
      raise UserError(f'{path}: names no workdir; restore it')
    noted = Path(found['workdir'])
  if asked is None:
    return None if noted is None else str(noted)
  if not begun:  # nothing has come of what is noted, which may not have fitted
    try:
      files.write_whole(path, json.dumps({'workdir': str(asked.absolute())}) + '\n')
    except OSError as error:
      raise files.cannot(f'{path}: cannot be written', error, 'choose another') from error
    return str(asked)
  if noted is None or noted.absolute() != asked.absolute():
    began = 'fresh weights' if noted is None else f'those of {noted}'
    raise UserError(
      f'--init_from={asked}: {workdir} holds a run that began with {began}; leave the flag out to '
      'go on, or give another --workdir'
    )
  return str(asked)


def weights(source: Path, config: ConfigDict, tokenizer: str, params: Any) -> tuple[int, Any]:
  """The step and weights of source's newest checkpoint, placed as the abstract `params` say.

  `tokenizer` is the digest of this run's. UserError that names the first weight that does not fit.
  """
  theirs = read_config(source, 'init_from')
  checkpoints = Checkpoints(source)
  saved, shapes = checkpoints.newest()
  if saved.get('tokenizer', tokenizer) != tokenizer:
    raise UserError(
      f'--init_from={source}: its tokens are of another tokenizer, and its weights mean nothing to '
      f'this one; take data.* from its config.json, data.tokenizer={theirs.data.tokenizer} of the '
      'text that it read'
    )
  wanted = {name: leaf.shape for name, leaf in flatten(params).items()}
  for name in sorted({*wanted, *shapes}):
    if wanted.get(name) != shapes.get(name):
      weight = name.removesuffix('/value')
      there, here = (_shape(of.get(name)) for of in (shapes, wanted))
      raise UserError(
        f'--init_from={source}: {weight} is {there} there and {here} here'
        f'{_fields(theirs, config)}, or give a run of the same shape'
      )
  for name in UNSEEN:
    if theirs.get(name) != config.get(name):
      told = f'{name}={theirs.get(name)} there, {config.get(name)} here'
      logging.warning('--init_from=%s: the weights were trained with %s', source, told)
  used = {'config': config_lib.to_json(theirs), 'data': None}
  return checkpoints.read_params(params, used)


def _shape(shape: tuple[int, ...] | None) -> str:
  return 'missing' if shape is None else str(list(shape))


def _fields(theirs: ConfigDict, ours: ConfigDict) -> str:
  """What makes the model's fields those of the other run, as they are typed."""
  there, here = config_lib.flatten(theirs), config_lib.flatten(ours)
  names = [
    *'attention num_layers d_model num_heads head_dim value_head_dim ffn_dim param_budget'.split(),
    *(*config_lib.OF_VARIANTS, 'round_to', 'tie_embeddings', 'data.tokenizer'),
  ]
  # Either may lack a field that only its variant reads: there is nothing to set then.
  both = [(name, there.get(name, 'unset'), here.get(name, 'unset')) for name in names]
  different = [
    f'--config.{name}={theirs}' for name, theirs, ours in both if theirs not in (ours, 'unset')
  ]
  return f'; set {" ".join(different)}' if different else '; set the fields of the model alike'
