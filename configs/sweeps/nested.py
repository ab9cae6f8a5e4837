"""One nested run, four widths, beside a run for each width; and one of twice the steps.

  python sweep.py --config=configs/mla_small.py --arms=configs/sweeps/nested.py \\
    --config.num_steps=800 --config.warmup_steps=150 --config.eval_every=800 \\
    --sweep=learning_rate=1.5e-3,3e-3,6e-3 --sweep=seed=0,1,2,3,4,5 --tune_on_first_seed \\
    --reference=mla-c64 --workdir=runs/nested

48 trials; each `nested` is judged as four arms, nested@8 to nested@32 and, whole, nested, and so is
`nested-twice`, whose schedule is twice as long. The separate arms are those of frontier.py: where
its results.jsonl and windows.npz are copied to the workdir first, theirs are taken as done.
"""

NESTED = {'latent_dim': 64, 'nested': '8,16,32,64'}


def get_arms():
  of_size = {'attention': 'mla', 'rope_dim': 32}
  return {
    'nested': {**of_size, **NESTED},
    'nested-twice': {**of_size, **NESTED, 'num_steps': 1600, 'warmup_steps': 300},
    'mla-c64': {**of_size, 'latent_dim': 64},
    'mla-c32': {**of_size, 'latent_dim': 32},
    'mla-c16': {**of_size, 'latent_dim': 16},
    'mla-c8': {**of_size, 'latent_dim': 8},
  }
