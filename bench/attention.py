"""Causal attention alone, forward and gradient: ours against torch, same inputs, float32.

python -m bench.attention [--rounds=3] [--lengths=256,1024,4096] [--json=FILE]

TOKENS tokens in windows of each length, with the head sizes of the small MHA (keys and values of
32) and MLA (keys of 64, values of 32) configs. torch runs its fused kernel
(scaled_dot_product_attention) and plain matmuls with a mask; its best counts. Outputs and
gradients must agree to 1e-4 of their size.
"""

import time

import numpy as np

from bench import harness

TOKENS, HEADS = 8192, 4
HEAD_DIMS = {'mha': (32, 32), 'mla': (64, 32)}  # of keys, of values
SECONDS = 3.0


def inputs_of(case: dict) -> list[np.ndarray]:
  """q, k, v and the output's gradient, [B, T, H, dims]."""
  keys, values = HEAD_DIMS[case['variant']]
  rng = np.random.default_rng(0)
  shape = (TOKENS // case['length'], case['length'], HEADS)
  return [rng.standard_normal((*shape, d)).astype(np.float32) for d in (keys, keys, values, values)]


def figures_of(once, wait, first) -> dict:
  """`first` are the output and the gradients, as numpy."""
  for _ in range(3):
    once()
  wait()
  times = []
  began = time.perf_counter()
  while time.perf_counter() - began < SECONDS:
    start = time.perf_counter()
    once()
    wait()
    times.append(time.perf_counter() - start)
  # Sums weighted by noise: equal only if the arrays are.
  sums = [float(np.sum(x * np.random.default_rng(1).standard_normal(x.shape))) for x in first]
  sizes = [float(np.linalg.norm(x)) for x in first]
  return {'ms': 1e3 * float(np.median(times)), 'sums': sums, 'sizes': sizes}


def ours(case: dict) -> dict:
  import jax

  from mla import backends, sharding

  q, k, v, d_out = inputs_of(case)
  backends.prepare(len(q))
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  scale = q.shape[-1] ** -0.5

  def both(q, k, v, d_out):
    out, pull = jax.vjp(
      lambda q, k, v: backends.causal_attention([q], [k], v, scale=scale), q, k, v
    )
    return out, *pull(d_out)

  with jax.set_mesh(mesh):
    placed = [sharding.put_batch(x, mesh) for x in (q, k, v, d_out)]
    began = time.perf_counter()
    compiled = jax.jit(both).lower(*placed).compile()
    compiling = time.perf_counter() - began
    last = None

    def once():
      nonlocal last
      last = compiled(*placed)

    first = [np.asarray(x) for x in compiled(*placed)]
    figures = figures_of(once, lambda: jax.block_until_ready(last), first)
  return {'blocks': {**figures, 'compile_seconds': compiling}}


def peer(case: dict) -> dict:
  import torch

  from mla.backends.cpu import host

  torch.set_num_threads(harness.cores())
  host.keep_freed_memory()
  q, k, v, d_out = (torch.tensor(x).transpose(1, 2).contiguous() for x in inputs_of(case))
  for x in (q, k, v):
    x.requires_grad_()
  hidden = torch.ones(case['length'], case['length'], dtype=torch.bool).triu(1)

  def fused():
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

  def plain():
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

  results = {}
  for name, attend in (('sdpa', fused), ('eager', plain)):

    def both(attend=attend):
      out = attend()
      return out, *torch.autograd.grad(out, (q, k, v), d_out)

    first = [x.detach().transpose(1, 2).numpy() for x in both()]
    results[name] = figures_of(both, lambda: None, first)
  return results


def main() -> None:
  args = harness.arguments({'ours': ours, 'peer': peer}, rounds=3, lengths='256,1024,4096')
  rows = []
  for variant in HEAD_DIMS:
    for length in map(int, args.lengths.split(',')):
      case = {'variant': variant, 'length': length}
      row = harness.side_by_side('bench.attention', case, args.rounds, 'ms', better=min)
      found = [figures for side in row['all_settings'].values() for figures in side.values()]
      for other in found[1:]:
        close = np.abs(np.subtract(other['sums'], found[0]['sums'])) <= 1e-4 * np.array(
          found[0]['sizes']
        )
        if not close.all():
          raise AssertionError(f'{variant}, length {length}: ours and torch differ')
      what = f'causal attention and gradient, {TOKENS // length} x {length}'
      rows.append({'variant': variant, 'what': what, 'unit': 'ms', **row})
  harness.report(rows, args.json)


if __name__ == '__main__':
  main()
