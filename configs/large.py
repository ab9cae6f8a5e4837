"""What the four large arms share: about 1.35B parameters, for 16 chips of a v5e.

1.21B of them are in the layers. The learning rate is that of others at this size (TinyLlama, arXiv
2401.02385); nothing here has been tuned yet, nor trained.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.num_heads = 16
  config.head_dim = 128
  config.num_layers = 24
  config.d_model = 2048
  config.param_budget = 1_214_000_000  # mha's with a feed-forward width of 5504
  config.round_to = 128  # the matmul units' size; parameters within 0.29 % of the budget
  config.rope_base = 10_000.0
  config.embedding_std = 0.02
  config.seq_len = 2048
  config.batch_size = 512
  config.accumulation_steps = 8  # 4 windows at once on each of 16 chips
  config.num_steps = 25_000  # 26 billion tokens, 20 a parameter (arXiv 2203.15556)
  config.learning_rate = 4e-4
  config.warmup_steps = 1000
  config.dtype = 'bfloat16'
  config.remat = 'latents'
  config.eval_every = 1000
  config.checkpoint_every = 500
  config.data.tokenizer = 'bpe:32000'
  config.data.eval_tokens = 1_048_576
  config.mesh = {'data': 1, 'fsdp': -1, 'tensor': 1}
  return config
