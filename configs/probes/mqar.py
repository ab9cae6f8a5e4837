"""Multi-query associative recall by MHA: eight pairs of a key and a value of 8, each asked once.

  python train.py --config=configs/probes/mqar.py

0.9996 of the answers are right after 2,000 steps. With 16 pairs, values of 16 and 1,000 steps 0.19
were: two layers must first learn to put a key beside its value, and few positions ask.
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:mqar'
  config.data.records = 8
  config.data.alphabet = 8
  config.num_steps = 2000
  return config
