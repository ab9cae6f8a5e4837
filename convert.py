"""Models in and out.

  python convert.py import --hf=DIR --workdir=runs/smollm2       a published model becomes a run
  python convert.py import --gguf=FILE --workdir=runs/smollm2
  python convert.py export --workdir=runs/mla_small --out=DIR    a run, as transformers loads it
  python convert.py compress --workdir=runs/mha_small --latent_dim=64 --out=runs/mha_as_mla
                                                                 MHA, GQA or MQA becomes MLA

docs/convert.md says what is read and written. Exit codes: 0 done, 2 a mistake in what was given,
with nothing written, 1 the machine failed.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

from absl import flags

from mla import cli

WORKDIR = flags.DEFINE_string('workdir', None, 'the run')
HF = flags.DEFINE_string('hf', None, 'import: a folder with config.json and safetensors')
GGUF = flags.DEFINE_string('gguf', None, 'import: a GGUF file in the layout of Llama')
OUT = flags.DEFINE_string('out', None, 'export, compress: the folder to make')
FORMAT = flags.DEFINE_string('format', 'auto', 'export: auto, llama, deepseek_v2, deepseek_v3')
LATENT = flags.DEFINE_integer(
  'latent_dim', None, "compress: C, the latent's width; export: the width a nested one is cut to"
)
ROPE = flags.DEFINE_integer('rope_dim', None, 'compress: R, dims that still turn; all if not given')
METHOD = flags.DEFINE_string('method', 'whitened', 'compress: svd, whitened, two_sided')

COMMANDS = ('import', 'export', 'compress')
COMMAND = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''

if __name__ == '__main__':
  cli.begin([arg for place, arg in enumerate(sys.argv) if place != 1 or not COMMAND])

from configs import base
from mla import paths
from mla.backends.cpu import host
from mla.convert import compress, exporting, importing
from mla.errors import UserError


def main() -> None:
  if COMMAND not in COMMANDS:
    raise UserError(f'{COMMAND or "command"}: choose one of {", ".join(COMMANDS)}')
  {'import': import_, 'export': export, 'compress': compress_}[COMMAND]()


def import_() -> None:
  host.return_freed_memory()
  folder, file = HF.value, GGUF.value
  workdir = _workdir()
  if folder is not None and file is None:
    config = importing.import_folder(paths.folder('hf', folder), base.get_config(), workdir)
  elif file is not None and folder is None:
    source = paths.source('gguf', file, 'model.gguf')
    config = importing.import_gguf(source, base.get_config(), workdir)
  else:
    raise UserError('--hf: give one of --hf=DIR and --gguf=FILE')
  print(f'{workdir}: {config.attention}, {config.num_layers} layers of width {config.d_model}')
  print(f'next: python eval.py --workdir={workdir}')


def export() -> None:
  host.return_freed_memory()
  workdir, out = _workdir(), _out()
  kind = exporting.export(workdir, out, FORMAT.value, LATENT.value)
  print(f'{out}: {kind}; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})')


def compress_() -> None:
  workdir, out = _workdir(), _out()
  if LATENT.value is None:
    raise UserError('--latent_dim: how wide shall the latent be? e.g. --latent_dim=128')
  report = compress.compress(
    workdir, out, latent_dim=LATENT.value, rope_dim=ROPE.value, method=METHOD.value
  )
  source, rotary, whole = (report['loss'][k] for k in ('source', 'rotary_only', 'compressed'))
  print(
    f'{out}: loss {whole:.4f}, of the source {source:.4f}; {rotary - source:+.4f} by the rotary '
    f'part, {whole - rotary:+.4f} by the rank'
  )


def _out() -> Path:
  if OUT.value is None:
    raise UserError('--out: which folder shall be made? e.g. --out=runs/converted')
  return paths.folder('out', OUT.value)


def _workdir() -> Path:
  if WORKDIR.value is None:
    raise UserError('--workdir: which run? e.g. --workdir=runs/imported')
  return paths.folder('workdir', WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
