"""Grouped-query attention at 134M parameters: three query heads share each of four key/value heads.

  python train.py --config=configs/gqa_medium.py --config.data.files='/corpus/*.txt'

The cache: 12,288 bytes a token in bfloat16.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'gqa'
  config.num_kv_heads = 4
  return config
