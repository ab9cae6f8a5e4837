"""draft"""

from configs import base


def get_config():
  config = base.get_config()
  config.attention = 'mqa'
  return config
