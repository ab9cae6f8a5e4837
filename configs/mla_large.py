"""Multi-head Latent Attention at 1.35B parameters.

  python train.py --config=configs/mla_large.py --config.data.files='/corpus/*.txt'

Target: v5e:4x4. Its dry run: 5.7 of 15.75 GiB a chip with 64 windows at once, at least 3.56 s
a step of 1,048,576 tokens, bound by compute.

The cache: 27,648 bytes a token in bfloat16.

The latent and the rotary key of DeepSeek-V2 (arXiv 2405.04434); queries and keys of 192, values of
128.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'mla'
  config.latent_dim = 512
  config.rope_dim = 64
  return config
