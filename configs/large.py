"""What the large arms share: 1.21B parameters outside the embeddings, 1.35B in all; T 2048.

For 16 chips of a v5e. Nothing has been trained yet at this size; base_medium.py says how the values
were chosen.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.num_heads = 16
  config.head_dim = 128
  config.num_layers = 24
  config.d_model = 2048
  # An MHA with ffn_dim 5504, a multiple of the matmul units' 128, as GQA's and MQA's then are.
  config.param_budget = 1_214_000_000
  config.rope_base = 10_000.0
  config.learning_rate = 4e-4  # TinyLlama's at 1.1B (arXiv 2401.02385)
  config.embedding_std = 0.02
  config.seq_len = 2048
  config.batch_size = 512  # a million tokens
  config.num_steps = 25_000  # 26 billion tokens, 20 a parameter
  config.warmup_steps = 1000
  config.dtype = 'bfloat16'
  config.checkpoint_every = 500
  config.data.tokenizer = 'bpe:32000'
  config.data.eval_tokens = 1_048_576
  config.mesh = {'data': 1, 'fsdp': -1, 'tensor': 1}
  return config
