"""Multi-query attention at 134M parameters: all query heads share one key/value head.

  python train.py --config=configs/mqa_medium.py --config.data.files='/corpus/*.txt'

The cache: 3,072 bytes a token in bfloat16.

Target: v5e:2x4. Its dry run: 5.3 of 15.75 GiB a chip with all 64 windows at once, at least
0.030 s a step of 65,536 tokens, bound by compute.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'mqa'
  return config
