"""Copying by MHA: 32 symbols of 16, a mark, and the same again.

  python train.py --config=configs/probes/copy.py

All answers are right after 1,000 steps. Whole heads turn, for here position is what finds a symbol.
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:copy'
  config.data.records = 32
  return config
