"""What a cache forgets: full, shared, fewer and smaller heads, and six latents, at equal bytes.

  python sweep.py --config=configs/probes/payload.py --arms=configs/sweeps/probes.py \\
    --sweep=learning_rate=3e-3,5e-3,8e-3 --sweep=seed=0,1,2,3 --tune_on_first_seed \\
    --reference=mha --workdir=runs/payload

Likewise with configs/probes/multikey.py, copy.py and, at rates of 1e-3, 2e-3 and 3e-3, mqar.py: 30
to 45 minutes each on two cores. Bytes are those of a bfloat16 cache, per token: 4 for each number
that both layers keep.

Every arm turns four dims of its keys (of keys of 4 and 6 two), as many as MLA's shared rotary key
has: where position tells nothing, heads that turn as a whole would lose by what no bytes explain.
"""


def get_arms():
  return {
    'mha': {'attention': 'mha', 'rope_dim': 4},  # 4 heads of 16: 512 bytes
    # Fewer heads, each with its own keys and values; the feed-forward part takes what they leave.
    'mha-2-heads': {'attention': 'mha', 'rope_dim': 4, 'num_heads': 2},  # 256
    'mha-1-head': {'attention': 'mha', 'rope_dim': 4, 'num_heads': 1},  # 128
    # Four query heads, fewer or smaller keys and values.
    'gqa': {'attention': 'gqa', 'rope_dim': 4, 'num_kv_heads': 2},  # 256
    'mqa': {'attention': 'mqa', 'rope_dim': 4},  # 128
    'mqa-heads-of-8': {'attention': 'mqa', 'rope_dim': 4, 'head_dim': 8},  # 64
    'mqa-heads-of-6': {'attention': 'mqa', 'rope_dim': 2, 'head_dim': 6},  # 48
    'mqa-heads-of-4': {'attention': 'mqa', 'rope_dim': 2, 'head_dim': 4},  # 32
    # A latent of C and a shared rotary key of 4: (C + 4) * 4 bytes. At 64 it would be as wide as
    # the model, and nothing could be lost.
    'mla-c60': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 60},  # 256
    'mla-c28': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 28},  # 128
    'mla-c20': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 20},  # 96
    'mla-c12': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 12},  # 64
    'mla-c8': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 8},  # 48
    'mla-c4': {'attention': 'mla', 'rope_dim': 4, 'latent_dim': 4},  # 32
  }
