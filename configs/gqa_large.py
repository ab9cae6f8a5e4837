"""Grouped-query attention at 1.35B parameters, four query heads to each of four key/value heads.

  python train.py --config=configs/gqa_large.py --config.data.files='corpus/*.txt'

Target: v5e:4x4. A bfloat16 cache of 49,152 bytes a token.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'gqa'
  config.num_kv_heads = 4
  return config
