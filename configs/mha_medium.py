"""Multi-head attention at 134M parameters: the reference that keeps every head's keys and values.

  python train.py --config=configs/mha_medium.py --config.data.files='/corpus/*.txt'

The cache: 36,864 bytes a token in bfloat16.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'mha'
  return config
