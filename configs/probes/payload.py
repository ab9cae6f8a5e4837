"""Payload recall by MHA.

python train.py --config=configs/probes/payload.py
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:payload'
  config.data.attributes = 4
  return config
