"""Multi-query associative recall by MHA: eight pairs of a key and a value of 8, each asked once.

  python train.py --config=configs/probes/mqar.py

0.9996 of the answers are right after 2,000 steps. Two layers must first learn to put a key beside
its value, and few positions ask. Where keys turn only four dims, as in configs/sweeps/probes.py, a
rate of 5e-3 stays at 0.33, and 1e-3 to 3e-3 learn it (one seed). 16 pairs, values of 16,
at 2e-3: 0.19 after 1,000 steps, 0.993 after 2,000.
"""

from configs.probes import tiny


def get_config():
  config = tiny.get_config()
  config.data.dataset = 'probe:mqar'
  config.data.records = 8
  config.data.alphabet = 8
  config.num_steps = 2000
  return config
