"""Multi-key recall by MHA: eight records of three values of 16, found by any of them.

  python train.py --config=configs/probes/multikey.py

All answers are right from step 500 on. With 16 records of four values nothing was learned in 1,500
steps (0.11).
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:multikey'
  config.data.records = 8
  config.data.attributes = 3
  return config
