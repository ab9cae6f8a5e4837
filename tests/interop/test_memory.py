"""Conversion holds the model once, and of the files no more than 1.3 times the largest."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent.parent

LAYERS, WIDTH, HIDDEN = 10, 768, 2304
MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from configs import base
from mla.convert import exporting, importing
import jax, orbax.checkpoint, safetensors.numpy
jax.numpy.zeros(3).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{work}
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
IMPORT = 'importing.import_folder(Path({0!r}), base.get_config(), Path({1!r}))'
EXPORT = "exporting.export(Path({1!r}), Path({2!r}), 'auto')"


def peak(work: str) -> int:
  """The bytes by which a fresh process's peak grows over the work."""
  code = MEASURE.format(root=str(ROOT), work=work)
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout.splitlines()[-1])


def test_a_model_of_300_megabytes(tmp_path):
  folder, size = write_model(tmp_path / 'their')
  assert size > 290e6
  places = (str(folder), str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert peak(IMPORT.format(*places)) <= size + 1.3 * size
  assert peak(EXPORT.format(*places)) <= size + 1.3 * size


def write_model(folder: Path) -> tuple[Path, int]:
  """A random Llama with a tokenizer of bytes in one file; and its bytes."""
  from mla.convert import vocabulary
  from mla.data.tokenizers import ByteTokenizer

  folder.mkdir()
  heads = WIDTH // 64
  config = {
    'model_type': 'llama',
    'vocab_size': 2048,
    'hidden_size': WIDTH,
    'intermediate_size': HIDDEN,
    'num_hidden_layers': LAYERS,
    'num_attention_heads': heads,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  files = vocabulary.to_files(ByteTokenizer())
  for name, content in files.items():
    (folder / name).write_text(content)
  shapes = {
    'model.embed_tokens.weight': (2048, WIDTH),
    'lm_head.weight': (2048, WIDTH),
    'model.norm.weight': (WIDTH,),
  }
  for layer in range(LAYERS):
    name = f'model.layers.{layer}.'
    for part in 'qkvo':
      shapes[f'{name}self_attn.{part}_proj.weight'] = (WIDTH, WIDTH)
    shapes[f'{name}mlp.gate_proj.weight'] = shapes[f'{name}mlp.up_proj.weight'] = (HIDDEN, WIDTH)
    shapes[f'{name}mlp.down_proj.weight'] = (WIDTH, HIDDEN)
    shapes[f'{name}input_layernorm.weight'] = (WIDTH,)
    shapes[f'{name}post_attention_layernorm.weight'] = (WIDTH,)
  rng = np.random.default_rng(0)
  save_file(
    {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
    folder / 'model.safetensors',
  )
  return folder, 4 * sum(math.prod(shape) for shape in shapes.values())
