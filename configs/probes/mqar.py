"""Multi-query associative recall by MHA.

python train.py --config=configs/probes/mqar.py
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:mqar'

  return config
