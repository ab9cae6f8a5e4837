"""Multi-head attention at 1.35B parameters.

  python train.py --config=configs/mha_large.py --config.data.files='/corpus/*.txt'

Target: v5e:4x4. Its dry run: 6.5 of 15.75 GiB a chip with 64 windows at once, at least 3.35 s
a step of 1,048,576 tokens, bound by compute.

The cache: 196,608 bytes a token in bfloat16.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'mha'
  return config
