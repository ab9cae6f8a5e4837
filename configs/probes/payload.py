"""Payload recall by MHA: 16 records of a key and four values of 16, 16 bits a record.

  python train.py --config=configs/probes/payload.py

All answers are right after 1,000 steps. With data.attributes=8 a record has 32 bits.
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:payload'
  config.data.attributes = 4
  return config
