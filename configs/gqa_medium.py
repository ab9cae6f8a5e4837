"""Grouped-query attention at 134M parameters: three query heads share each of four key/value heads.

  python train.py --config=configs/gqa_medium.py --config.data.files='/corpus/*.txt'

The cache: 12,288 bytes a token in bfloat16.

Target: v5e:2x4. Its dry run: 5.4 of 15.75 GiB a chip with all 64 windows at once, at least
0.030 s a step of 65,536 tokens, bound by compute.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'gqa'
  config.num_kv_heads = 4
  return config
