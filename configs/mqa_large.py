"""Multi-query attention at 1.35B parameters, all query heads on one key/value head.

  python train.py --config=configs/mqa_large.py --config.data.files='/corpus/*.txt'

Target: v5e:4x4. Its dry run: 5.1 of 15.75 GiB a chip with 64 windows at once, at least 3.43 s
a step of 1,048,576 tokens, bound by compute.

The cache: 12,288 bytes a token in bfloat16.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'mqa'
  return config
