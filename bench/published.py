"""A published model: time a generated token, ours against transformers with the same weights.

python -m bench.published --workdir=W --folder=DIR [--rounds=1] [--context=1024] [--json=FILE]

W is an imported run and DIR the same model as transformers loads it (`python convert.py export
--workdir=W --out=DIR`). Both read the first `context` tokens of the validation text and go on
greedily, batch 1, float32 with a float32 cache; only the generation is timed. Their first tokens
must be equal. Of transformers' settings (bench.decode) the best counts.
"""

from pathlib import Path

import numpy as np

from bench import harness
from bench.decode import CHECKED, time_peers


def prompt_of(run, context: int) -> np.ndarray:
  from mla.data.pipeline import TokenStream, load_data

  stream = load_data(run.config).validation
  assert isinstance(stream, TokenStream)
  return stream.tokens[None, :context].astype(np.int32)


def ours(case: dict) -> dict:
  import jax
  import jax.numpy as jnp

  from bench import generation
  from mla import backends, generate
  from mla.model import allocate_cache, prefill

  backends.prepare(1)
  run = generate.load(Path(case['workdir']))
  prompt = prompt_of(run, case['context'])
  slots = case['context'] + generation.SLOTS
  empty = allocate_cache(run.model, batch=1, slots=slots, dtype='float32')
  with jax.set_mesh(generation.mesh_of(1)):
    model, cache = generation.place(run.model, empty, generation.mesh_of(1))
    fill = jax.jit(prefill, donate_argnums=1)
    logits, cache = fill(model, cache, prompt, np.array([case['context']], np.int32))
    start = (cache, jnp.argmax(logits, -1))
    ((figures, tokens),) = generation.time_generation(model, [start])
  return {'cached': {**figures, 'first_tokens': tokens[0][:, :CHECKED].tolist()}}


def peer(case: dict) -> dict:
  import torch
  import transformers

  from mla import generate

  torch.set_num_threads(harness.cores())
  prompt = prompt_of(generate.load(Path(case['workdir'])), case['context'])
  models = {
    name: transformers.AutoModelForCausalLM.from_pretrained(
      case['folder'], attn_implementation=name
    ).eval()
    for name in ('sdpa', 'eager')
  }
  return time_peers(models, torch.tensor(prompt, dtype=torch.long))


def main() -> None:
  args = harness.arguments(
    {'ours': ours, 'peer': peer}, rounds=1, workdir='', folder='', context=1024
  )
  case = {'workdir': args.workdir, 'folder': args.folder, 'context': args.context}
  row = harness.side_by_side('bench.published', case, args.rounds, 'ms_per_token', better=min)
  settings = row['all_settings']
  firsts = [s['first_tokens'] for side in settings.values() for s in side.values()]
  if any(first != firsts[0] for first in firsts):
    raise AssertionError('ours and peer do not generate the same tokens')
  what = f'generation, batch 1, context {args.context}'
  rows = [{'variant': Path(args.workdir).name, 'what': what, 'unit': 'ms/token', **row}]
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
