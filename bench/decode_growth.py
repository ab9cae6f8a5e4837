"""Our decoding alone: time a token against context, batch, variant and cache dtype.

python -m bench.decode_growth [--variants=mha,gqa,mqa,mla] [--dtypes=float32,bfloat16,int8]
                              [--contexts=512,2048,8192,32768] [--batches=1,8,32] [--json=FILE]

The caches are filled with noise, for a step's time does not depend on what it reads. The contexts
take turns; times are medians, and growth is the median of the ratios within a turn, or a memory
whose speed jumps would decide. `read` is a plain read of as many bytes: it grows faster than they
do where the smaller cache fits the processor's own caches and the larger does not. `bytes accessed`
are of the compiled step on one device: XLA's count, which leaves out what C++ reads, and the arrays
that the program hands to C++'s cached attention, MLA's latent twice, as keys and as values.
There is no peer; bench.decode has one.
"""

import math
import re
from statistics import median
from typing import Any

from bench import harness

ACCESSED_AT = (8, 8192)  # batch and context whose compiled step's bytes are counted


def measure(case: dict) -> dict:
  """{setting: figures} of one variant and dtype over all contexts and batches."""
  import jax
  import jax.numpy as jnp

  from bench import generation
  from mla import backends
  from mla.model import decode, make_model

  backends.prepare(max(case['batches']))
  model = make_model(generation.small_config(case['variant']), 257)
  results = {}
  for batch in case['batches']:
    mesh = generation.mesh_of(max(n for n in range(1, jax.device_count() + 1) if batch % n == 0))
    with jax.set_mesh(mesh):
      starts = []
      for context in case['contexts']:
        cache = generation.noise_cache(model, batch, context, case['cache_dtype'])
        placed, cache = generation.place(model, cache, mesh)
        starts.append((cache, jnp.zeros(batch, jnp.int32)))
      measured = generation.time_generation(placed, starts)
    del cache, starts
    for context, (figures, _) in zip(case['contexts'], measured, strict=True):
      results[f'{batch} x {context}'] = figures
  batch, context = ACCESSED_AT
  if f'{batch} x {context}' in results:
    cache = generation.noise_cache(model, batch, context, case['cache_dtype'])
    token = jnp.zeros((batch, 1), jnp.int32)
    step = jax.jit(decode, donate_argnums=1).lower(model, cache, token).compile()
    costs: Any = step.cost_analysis()
    accessed = costs['bytes accessed'] + bytes_handed_over(str(step.as_text()))
    results[f'{batch} x {context}']['bytes_accessed'] = accessed
  return results


BYTES = {'f32': 4, 'bf16': 2, 's8': 1, 's32': 4}


def bytes_handed_over(program: str) -> int:
  """Bytes of all arrays given to C++'s cached attention; MLA's latent is key and value."""
  total = 0
  for call in re.findall(r'custom-call\(.*"mla_cached_forward".*', program):
    operands = call[: call.index(')')].count('%')
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', call[call.index('operand_layout_constraints') :])
    sizes = [BYTES[kind] * math.prod(map(int, dims.split(','))) for kind, dims in shapes]
    total += sum(sizes[:operands])
  return total


def rows_of(case: dict, results: dict) -> list[dict]:
  rows = []
  for setting, figures in results.items():
    batch, context = map(int, setting.split(' x '))
    rows.append(
      {
        'variant': case['variant'],
        'what': f'decode, batch {batch}, context {context}, {case["cache_dtype"]} cache',
        'unit': 'ms/token',
        'ours': median(figures['turns_ms']),
        'peer': None,
        'ratio': None,
        'batch': batch,
        'context': context,
        **figures,
      }
    )
  return rows


def table(case: dict, results: dict) -> str:
  """A line a batch: ms a token by context, and time's growth against that of the bytes."""
  lines = []
  first, last = case['contexts'][-2:] if len(case['contexts']) > 1 else case['contexts'] * 2
  for batch in case['batches']:
    of = {context: results[f'{batch} x {context}'] for context in case['contexts']}
    times = '  '.join(f'{median(of[context]["turns_ms"]):9.2f}' for context in of)
    time, read = (
      median(b / a for a, b in zip(of[first][name], of[last][name], strict=True))
      for name in ('turns_ms', 'turns_read_ms')
    )
    size = of[last]['cache_bytes'] / of[first]['cache_bytes']
    speed = of[last]['cache_bytes'] / median(of[last]['turns_ms']) / 1e6
    lines.append(
      f'{case["variant"]:4}  {case["cache_dtype"]:8}  batch {batch:2}  {times}  '
      f'time x {time:.2f}  bytes x {size:.2f}  read x {read:.2f}  {speed:.1f} GB/s'
    )
  accessed = results.get('{} x {}'.format(*ACCESSED_AT), {})
  if 'bytes_accessed' in accessed:
    times_read = accessed['bytes_accessed'] / accessed['cache_bytes']
    lines.append(f'{"":16}bytes accessed / cache bytes at 8 x 8192: {times_read:.2f}')
  return '\n'.join(lines)


def main() -> None:
  args = harness.arguments(
    {'ours': measure},
    variants='mha,gqa,mqa,mla',
    dtypes='float32,bfloat16,int8',
    contexts='512,2048,8192,32768',
    batches='1,8,32',
  )
  contexts, batches = ([int(n) for n in x.split(',')] for x in (args.contexts, args.batches))
  print(f'ms a token at contexts {args.contexts}; growth from {contexts[-2:]}')
  rows = []
  for variant in args.variants.split(','):
    for dtype in args.dtypes.split(','):
      case = {
        'variant': variant,
        'cache_dtype': dtype,
        'contexts': contexts,
        'batches': batches,
      }
      results = harness.run_worker('bench.decode_growth', 'ours', case)
      print(table(case, results), flush=True)
      rows += rows_of(case, results)
  harness.write(rows, args.json)


if __name__ == '__main__':
  main()
