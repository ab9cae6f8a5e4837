"""Multi-head Latent Attention of 0.8M non-embedding parameters: trains in minutes on two cores.

  python train.py --config=configs/mla_small.py

Two CPU cores: three minutes. Validation: 1.580 bits per byte (2.990 perplexity) through a bfloat16
cache of 512 bytes a token, a quarter of mha_small's.

Why these values (docs/log.md, "Where MLA's gap comes from"): at this size the rotary share counts
most. Of 64 cached elements, 32 for the latent and 32 for the rotary key beat 48 + 16 by 0.031 nats
and 16 + 48 by 0.021. Half the initial scale of the up-projections, a learning rate
of 4.5e-3, and 8 heads of 16 changed no more than another seed does (0.005 nats).
"""

from configs import base


def get_config():
  config = base.get_config()
  config.attention = 'mla'
  config.latent_dim = 32
  config.rope_dim = 32
  return config
