"""Grouped-query attention at 1.35B parameters, four query heads to each of four key/value heads.

  python train.py --config=configs/gqa_large.py --config.data.files='/corpus/*.txt'

Target: v5e:4x4. Its dry run: 5.4 of 15.75 GiB a chip with 64 windows at once, at least 3.42 s
a step of 1,048,576 tokens, bound by compute.

The cache: 49,152 bytes a token in bfloat16.
"""

from configs import large


def get_config():
  config = large.get_config()
  config.attention = 'gqa'
  config.num_kv_heads = 4
  return config
