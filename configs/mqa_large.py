"""Multi-query attention at 1.35B parameters, all query heads on one key/value head.

  python train.py --config=configs/mqa_large.py --config.data.files='corpus/*.txt'

Target: v5e:4x4. A bfloat16 cache of 12,288 bytes a token.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'mqa'
  return config
