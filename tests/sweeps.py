"""A made-up sweep, as a real one leaves it: for tests of what is made of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import tiny_config

from mla.sweep import results as results_lib
from mla.sweep import run as sweep
from mla.sweep import trials

# {arm: (variant, bytes a token, loss)}; two of equal bytes.
ARMS = {
  'mha': ('mha', 64.0, 1.2),
  'mqa': ('mqa', 16.0, 1.22),
  'c8': ('mla', 16.0, 1.21),
  'c4': ('mla', 8.0, 1.3),
}
LATENTS = {'c8': 8, 'c4': 4}


def fake_line(trial, best: dict[str, float]) -> dict:
  """A result whose loss is lowest at the arm's best rate."""
  loss = 1 + abs(trial.learning_rate - best[trial.arm]) + 0.001 * trial.seed
  return {
    **sweep.failed_line(trial, ''),
    'status': 'done',
    'loss': loss,
    'attention': 'mla',
    'latent_dim': trial.config.latent_dim,
    'kv_cache_bytes_per_token': float(trial.config.latent_dim),
    'params_total': 1,
    'params_non_embedding': 1,
    'bits_per_byte': loss,
    'tokens_per_second': 1.0,
    'tokens_evaluated': 4,
    'cache_dtype': 'bfloat16',
    'flops_per_token': 1.0,
    'training_memory': {
      remat: {'peak_bytes': 1, 'activation_bytes': 1} for remat in ('none', 'latents')
    },
    'window_nll': [loss, loss + 1],
  }


def made_up_sweep(folder: Path, more: Mapping[str, tuple[str, float, float]] | None = None) -> Path:
  """Arms of known losses, three seeds each; of the smallest it is not known what training costs."""
  results = sweep.Results(folder)
  for number, (arm, (attention, size, loss)) in enumerate({**ARMS, **(more or {})}.items()):
    fields = {'attention': attention, 'rope_dim': 4, 'latent_dim': 4 + number}
    fields |= {'num_kv_heads': 2} if attention == 'gqa' else {}
    for seed in (0, 1, 2):
      (trial,) = trials.expand(
        tiny_config('mla'), {arm: fields}, [trials.parse_axis(f'seed={seed}')]
      )
      line = {
        **fake_line(trial, {arm: trial.learning_rate}),
        'attention': attention,
        'latent_dim': LATENTS.get(arm),
        'loss': loss + 0.001 * seed,
        'flops_per_token': 7e6,
        'kv_cache_bytes_per_token': size,
      }
      if arm == 'c4':  # what training costs is not always known
        line['flops_per_token'] = line['training_memory'] = None
      results.add(line)
  return folder


def made_up_probe(folder: Path, attributes: int = 4) -> Path:
  """The same of a probe: accuracies that fall as the losses rise."""
  kept = results_lib.Results(made_up_sweep(folder))
  probe = {'probe': 'payload', 'records': 16, 'attributes': attributes, 'alphabet': 16}
  for line in results_lib.read_lines(folder / 'results.jsonl'):
    accuracy = 2.2 - line['loss']
    recalled = {'accuracy': accuracy, 'bits_recalled': 100 * accuracy, 'bits_held': 64 * attributes}
    kept.add({**line, **probe, **recalled, 'bits_per_byte': None})
  return folder


def made_up_caches(*accuracies: Sequence[float]) -> list[dict]:
  """The runs in eval.py's JSON of trials of one arm, read through bfloat16 and int8."""
  sizes = {'bfloat16': 48.0, 'int8': 40.0}
  return [
    {
      'workdir': f'sweep/trials/c8,seed={seed}', 'attention': 'mla', 'cache_dtype': cache,
      'latent_dim': 8, 'kv_cache_bytes_per_token': sizes[cache], 'accuracy': share,
    }
    for cache, shares in zip(sizes, accuracies, strict=True)
    for seed, share in enumerate(shares)
  ]  # fmt: skip
