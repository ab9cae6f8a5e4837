"""SmolLM2-135M as MLA, trained on after it was compressed: healing.

  python convert.py import --gguf=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  python convert.py compress --workdir=runs/smollm2 --latent_dim=192 --method=two_sided \\
    --out=runs/smollm2-c192
  python train.py --config=configs/healing.py --init_from=runs/smollm2-c192 \\
    --workdir=runs/smollm2-c192-healed

Likewise with 128 and --config.latent_dim=128; and the source itself, so that what healing brings
can be told from what more text of this kind does: --config.attention=gqa --config.num_kv_heads=3
--config.rope_dim=0 --config.latent_dim=0 --init_from=runs/smollm2. A quarter of an hour each on two
CPU cores; what came of it stands in docs/convert.md.
"""

from configs import base


def get_config():
  config = base.get_config()
  # The model's, as convert.py leaves it in config.json.
  config.update(
    attention='mla', latent_dim=192, rope_dim=64, latent_norm=False, num_layers=30, d_model=576,
    num_heads=9, head_dim=64, ffn_dim=1536, rope_base=100000.0, norm_eps=1e-5, tie_embeddings=True,
  )  # fmt: skip
  config.data.tokenizer = 'hf:runs/smollm2/tokenizer.json'
  # A tenth of what trains small models from scratch, and not tuned.
  config.update(learning_rate=2e-4, warmup_steps=6, num_steps=75)
  config.update(batch_size=8, seq_len=256, log_every=5, eval_every=75, checkpoint_every=75)
  config.data.eval_tokens = 8192
  return config
