"""Multi-head Latent Attention at 134M parameters: a latent of 256 and a rotary key of 32 a layer.

  python train.py --config=configs/mla_medium.py --config.data.files='/corpus/*.txt'

The cache: 6,912 bytes a token in bfloat16, between gqa_medium's and mqa_medium's. Heads are 96 wide
in queries and keys, 64 without position and 32 rotary, and 64 in values: sizes that the TPU's and
the GPU's attention kernels take.

Target: v5e:2x4. Its dry run: 5.8 of 15.75 GiB a chip with all 64 windows at once, at least
0.031 s a step of 65,536 tokens, bound by compute. With remat=latents 3.0 GiB and at least 0.037 s.
"""

from configs import medium


def get_config():
  config = medium.get_config()
  config.attention = 'mla'
  config.latent_dim = 256
  config.rope_dim = 32
  return config
