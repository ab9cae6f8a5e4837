"""draft"""

from configs import base


def get_config():
  config = base.get_config()
  config.attention = 'mla'
  config.latent_dim = 32
  config.rope_dim = 32
  return config
