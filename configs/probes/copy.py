"""Copying by MHA.

python train.py --config=configs/probes/copy.py
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:copy'
  config.data.records = 32
  return config
