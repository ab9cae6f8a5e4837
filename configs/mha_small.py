"""draft"""

from configs import base


def get_config():
  config = base.get_config()
  config.attention = 'mha'
  return config
