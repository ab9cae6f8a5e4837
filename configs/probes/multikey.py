"""Multi-key recall by MHA.

python train.py --config=configs/probes/multikey.py
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:multikey'
  config.data.attributes = 4
  return config
