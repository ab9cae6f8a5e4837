"""Longer contexts in subwords: 1,024 tokens of some four bytes, where the frontier's are 256 bytes.

  python sweep.py --config=configs/mha_small.py --arms=configs/sweeps/long.py \\
    --config.data.tokenizer=bpe:4096 --config.seq_len=1024 --config.batch_size=2 \\
    --config.rope_base=400 --config.num_steps=800 --config.warmup_steps=150 \\
    --config.eval_every=800 --sweep=learning_rate=3e-3 --sweep=seed=1,2,3 --reference=mha \\
    --workdir=runs/long

As many tokens a step as the frontier's, and wavelengths that reach as far over the window. Bytes
are those of a bfloat16 cache, per token.
"""


def get_arms():
  return {
    'mha': {'attention': 'mha'},  # 2,048
    'mqa': {'attention': 'mqa'},  # 512
    'mla-c32': {'attention': 'mla', 'latent_dim': 32, 'rope_dim': 32},  # 512
    'mla-c8': {'attention': 'mla', 'latent_dim': 8, 'rope_dim': 32},  # 320
  }
