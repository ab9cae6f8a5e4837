"""Makes the tokens of a corpus, once, for all runs that read it.

  python prepare.py --config=configs/mla_medium.py
  python prepare.py --config=configs/mla_medium.py --config.data.files='/some/*.parquet'
  python prepare.py --config=configs/mla_small.py --config.data.tokenizer=bpe:4096

train.py does the same by itself where it has not been done. Stopped or killed, it goes on when it
is run again; the tokens lie in data.data_dir/mla_tokens. Exit codes: 0 prepared, 2 a mistake in
what was given, 1 the machine failed, 143 stopped by SIGTERM and 130 by Ctrl-C, with what is made
kept.
"""

# ruff: noqa: E402
import time

from configs import base
from mla import cli

CONFIG = cli.define_config('--config=configs/mla_small.py', base)

if __name__ == '__main__':
  cli.begin(say='loading')

from mla import config, signals
from mla.data import pipeline, token_files


def main() -> int:
  if CONFIG.value is None:
    raise cli.which_config()
  config.validate(CONFIG.value)
  stop = signals.StopSignal()
  began = time.monotonic()
  try:
    data = pipeline.load_data(CONFIG.value, lambda: stop.requested != 0)
  except signals.Stopped:
    print('stopped; run the same command again to go on')
    return signals.exit_code(stop.requested)
  finally:
    stop.restore()
  for split in token_files.SPLITS:
    tokens = getattr(data, split).tokens
    print(f'{split}: {len(tokens):,} tokens, {tokens.nbytes / 1e6:,.1f} MB')
  print(f'vocabulary {data.tokenizer.vocab_size:,}; {data.place}; {time.monotonic() - began:.1f} s')
  return 0


if __name__ == '__main__':
  cli.run(main)
