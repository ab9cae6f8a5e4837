"""Multi-query attention at 134M parameters: all query heads share one key/value head.

  python train.py --config=configs/mqa_medium.py --config.data.files='/corpus/*.txt'

The cache: 3,072 bytes a token in bfloat16.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'mqa'
  return config
