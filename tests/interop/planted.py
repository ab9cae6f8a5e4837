"""Tiny runs that nobody trained, and comparisons with transformers."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla import config as config_lib
from mla import generate
from mla import model as model_lib
from mla.checkpoint import Checkpoints, flatten
from mla.data.pipeline import load_data
from mla.data.tokenizers import Tokenizer, save

WORDS = 'we the people of bottles on the wall; und Käse, 你好 \u2581 <s> <|endoftext|>\n\n  x'


def plant(config, workdir: Path, text: Path) -> Path:
  """A run of one step, its weights and gains drawn; its text is the file `text`."""
  config.data.files = str(text)
  data = load_data(config)
  model = model_lib.make_model(config, data.tokenizer.vocab_size)
  config.ffn_dim = model.blocks.ffn.w_gate.shape[-1]
  rng = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[-1] == 'gain':
      leaf[...] = jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
  workdir.mkdir(parents=True)
  saved = config_lib.to_json(config)
  (workdir / 'config.json').write_text(json.dumps(saved))
  with Checkpoints(workdir) as checkpoints:
    run = {'config': saved, 'data': data.digest, 'batches': 1, 'tokenizer': data.tokenizer.digest}
    save(data.tokenizer, workdir)
    checkpoints.save(1, nnx.state(model, nnx.Param), {'none': np.zeros(1)}, run)
  return workdir


def opened(workdir: Path) -> tuple[model_lib.Decoder, Tokenizer]:
  """The run's model and tokenizer."""
  run = generate.load(workdir)
  return run.model, run.tokenizer


def params(model: model_lib.Decoder) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in flatten(nnx.state(model, nnx.Param)).items()}


def cached_logits(model: model_lib.Decoder, tokens: np.ndarray, chunk: int = 7) -> np.ndarray:
  """Read through a float32 cache, `chunk` tokens at a time."""
  cache = model_lib.allocate_cache(model, batch=len(tokens), slots=tokens.shape[1], dtype='float32')
  parts = []
  for start in range(0, tokens.shape[1], chunk):
    logits, cache = model_lib.decode(model, cache, jnp.asarray(tokens[:, start : start + chunk]))
    parts.append(np.asarray(logits))
  return np.concatenate(parts, axis=1)


def their_logits(peer, tokens: np.ndarray, chunk: int | None = None) -> np.ndarray:
  """All at once, or through their cache."""
  import torch

  ids = torch.tensor(tokens, dtype=torch.long)
  with torch.no_grad():
    if chunk is None:
      return peer(ids, use_cache=False).logits.float().numpy()
    cache, parts = None, []
    for start in range(0, ids.shape[1], chunk):
      out = peer(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
      cache = out.past_key_values
      parts.append(out.logits.float().numpy())
  return np.concatenate(parts, axis=1)
