"""Multi-head attention at 1.35B parameters.

  python train.py --config=configs/mha_large.py --config.data.files='corpus/*.txt'

Target: v5e:4x4. A bfloat16 cache of 196,608 bytes a token.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'mha'
  return config
