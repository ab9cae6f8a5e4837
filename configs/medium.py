"""What the four medium arms share: about 134M parameters for one accelerator, or eight.

85M of them are in the layers, the size of GPT-2 small, and 49M in the embedding and the output
projection of 32,000 subwords. `data.*` is to be set to a corpus of billions of tokens: the embedded
one has 2.3 million of them.

The learning rate is the usual one of this size; nothing here has been tuned yet.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.num_heads = 12
  config.head_dim = 64
  config.num_layers = 12
  config.d_model = 768
  config.param_budget = 84_950_000  # mha's with a feed-forward width of 2048
  config.round_to = 32  # parameters within 0.36 % of the budget; with 64 it would be 0.7, 128 1.4
  config.rope_base = 10_000.0
  config.embedding_std = 0.02
  config.seq_len = 1024
  config.batch_size = 64
  config.num_steps = 20_000
  config.learning_rate = 6e-4
  config.warmup_steps = 700
  config.dtype = 'bfloat16'
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.data.tokenizer = 'bpe:32000'
  config.data.eval_tokens = 1_048_576
  return config
