"""draft"""

from configs import base


def get_config():
  config = base.get_config()
  config.attention = 'gqa'
  config.num_kv_heads = 2
  return config
