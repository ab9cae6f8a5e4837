"""Writes text with a trained run, reading through its KV cache.

  python generate.py --workdir=runs/mla_small --prompt='The people of'
  python generate.py --workdir=runs/mla_small --prompts=FILE --steps=100 --temperature=0
  python generate.py --workdir=runs/mla_small --prompt='We' --batch=8 --cache_dtype=int8

Text comes on stdout as it is written, what it cost on stderr: tokens a second, time a token, bytes
of the cache. The same seed writes the same text.
"""

# ruff: noqa: E402
import sys

from absl import flags

from mla import cli

WORKDIR = flags.DEFINE_string('workdir', None, 'the run that writes')
PROMPT = flags.DEFINE_string('prompt', None, "what is to be continued; '' starts a document")
PROMPTS = flags.DEFINE_string('prompts', None, 'or a file of prompts, one a line')
STEPS = flags.DEFINE_integer('steps', 200, 'tokens to write, if the document is not done before')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token')
TOP_P = flags.DEFINE_float('top_p', 0.95, 'only of the likeliest tokens that make up this share')
CACHE_DTYPE = flags.DEFINE_string('cache_dtype', 'bfloat16', 'float32, bfloat16 or int8')
LATENT_DIM = flags.DEFINE_integer('latent_dim', None, 'of a nested latent; all when not given')
SEED = flags.DEFINE_integer('seed', 0, 'of what is drawn')
BATCH = flags.DEFINE_integer(
  'batch', 1, 'texts side by side: of one prompt that many, of a file that many at a time'
)

if __name__ == '__main__':
  cli.begin()

from mla import backends, files, generate, paths
from mla.errors import UserError


def main() -> None:
  if WORKDIR.value is None:
    raise UserError('--workdir: which run? e.g. --workdir=runs/mla_small')
  workdir = paths.folder('workdir', WORKDIR.value)
  generate.check(STEPS.value, TEMPERATURE.value, TOP_P.value, CACHE_DTYPE.value, BATCH.value)
  prompts = asked()
  backends.prepare(1)
  run = generate.load(workdir, LATENT_DIM.value)
  longest = max(len(run.tokenizer.encode(prompt)) for prompt in prompts) + STEPS.value
  name = f'{workdir}: {run.config.attention}, step {run.step}'
  print(name, file=sys.stderr)
  if longest > run.config.seq_len:
    trained = f'it was trained on {run.config.seq_len} tokens at a time'
    print(f'note: {trained}; beyond them its text gets worse', file=sys.stderr)
  for start in range(0, len(prompts), BATCH.value):
    rows = prompts[start : start + BATCH.value]
    texts = Texts(rows, first=start == 0)
    written = generate.write(
      run,
      rows,
      texts.add,
      steps=STEPS.value,
      temperature=TEMPERATURE.value,
      top_p=TOP_P.value,
      cache_dtype=CACHE_DTYPE.value,
      seed=SEED.value + start,
    )
    texts.end()
    print(generate.card(run, written, CACHE_DTYPE.value), file=sys.stderr)


def asked() -> list[str]:
  """The prompts, each as often as it is to be continued."""
  if PROMPTS.value is None or PROMPT.value is not None:
    if PROMPTS.value is not None or PROMPT.value is None:
      raise UserError("--prompt: continue what? give --prompt='The ' or --prompts=FILE, not both")
    return [PROMPT.value] * BATCH.value
  path = paths.source('prompts', PROMPTS.value, 'prompts.txt')
  try:
    lines = files.read_bytes(path, 'choose another').decode().splitlines()
  except UnicodeDecodeError as error:
    raise UserError(f'--prompts={path}: is not UTF-8; convert it') from error
  if not any(lines):
    raise UserError(f'--prompts={path}: holds no line of text; write a prompt a line')
  return [line for line in lines if line]


class Texts:
  """Rows of text on stdout: the first as it comes, the others below it when they are done."""

  def __init__(self, prompts: list[str], first: bool):
    self._texts = list(prompts)
    if not first:
      print('\n---')
    self._show(prompts[0])

  def add(self, row: int, text: str) -> None:
    self._texts[row] += text
    if row == 0:
      self._show(text)

  def end(self) -> None:
    for text in self._texts[1:]:
      self._show(f'\n---\n{text}')
    print(flush=True)

  def _show(self, text: str) -> None:
    """A terminal is not given what it would obey."""
    if sys.stdout.isatty():
      text = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
    print(text, end='', flush=True)


if __name__ == '__main__':
  cli.run(main)
