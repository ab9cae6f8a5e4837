"""What the probes share: two layers of width 64, which train in half a minute on a core."""

from configs import base


def get_config():
  config = base.get_config()
  config.num_layers = 2
  config.d_model = 64
  config.num_heads = 4
  config.head_dim = 16
  config.param_budget = 80_000
  config.seq_len = 64
  config.batch_size = 16
  config.num_steps = 1000
  config.learning_rate = 5e-3
  config.warmup_steps = 100
  config.eval_every = 500
  config.checkpoint_every = 500
  config.log_every = 100
  return config
