"""The frontier: six latents against full, fewer, shared and smaller heads, all of one size.

  python sweep.py --config=configs/mha_small.py --arms=configs/sweeps/frontier.py \\
    --config.num_steps=800 --config.warmup_steps=150 --config.eval_every=800 \\
    --sweep=learning_rate=1.5e-3,3e-3,6e-3 --sweep=seed=0,1,2,3,4,5 --tune_on_first_seed \\
    --reference=mha --workdir=runs/frontier --engine=ray --resources=cpu=1

104 trials, two at a time on two CPU cores: two and a half hours. Without the last two
flags, and without Ray, one after another. Bytes are those of a bfloat16 cache, per token.

Seed 0 chooses each arm's learning rate (39 trials), the five others judge it (65). The published
results were looked at three times, after seeds 0 to 2, 0 to 4 and 0 to 5; looks.json counts that.
"""


def get_arms():
  return {
    'mha': {'attention': 'mha'},  # 4 heads of 32: 2,048 bytes
    # Fewer heads, each with its own keys and values; the feed-forward part takes what they leave.
    'mha-2-heads': {'attention': 'mha', 'num_heads': 2},  # 1,024
    'mha-1-head': {'attention': 'mha', 'num_heads': 1},  # 512
    # All query heads, fewer or smaller keys and values.
    'gqa': {'attention': 'gqa', 'num_kv_heads': 2},  # 1,024
    'mqa-head-64-half-rope': {'attention': 'mqa', 'head_dim': 64, 'rope_dim': 32},  # 1,024
    'mqa': {'attention': 'mqa'},  # 512
    'mqa-8-heads-of-16': {'attention': 'mqa', 'num_heads': 8, 'head_dim': 16},  # 256
    # A latent of C and a shared rotary key of 32: (C + 32) * 8 bytes.
    'mla-c128': {'attention': 'mla', 'latent_dim': 128, 'rope_dim': 32},  # 1,280
    'mla-c64': {'attention': 'mla', 'latent_dim': 64, 'rope_dim': 32},  # 768
    'mla-c32': {'attention': 'mla', 'latent_dim': 32, 'rope_dim': 32},  # 512
    'mla-c16': {'attention': 'mla', 'latent_dim': 16, 'rope_dim': 32},  # 384
    'mla-c8': {'attention': 'mla', 'latent_dim': 8, 'rope_dim': 32},  # 320
    'mla-c2': {'attention': 'mla', 'latent_dim': 2, 'rope_dim': 32},  # 272
  }
