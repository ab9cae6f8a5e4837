"""Models in and out.

  python convert.py import --hf=DIR|--gguf=FILE --workdir=W     a published model becomes a run
  python convert.py export --workdir=W --out=DIR                a run, as transformers loads it

Exit codes: 0 done, 2 a mistake in what was given, with nothing written, 1 the machine failed.
"""

import sys

from absl import flags

from configs import base
from mla import cli, paths
from mla.convert import configs, exporting, importing
from mla.errors import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'the run')
HF = flags.DEFINE_string('hf', None, 'import: a folder with config.json and safetensors')
OUT = flags.DEFINE_string('out', None, 'export: the folder to make')
FORMAT = flags.DEFINE_string('format', 'auto', f'export: auto, {", ".join(configs.CLASSES)}')
GGUF = flags.DEFINE_string('gguf', None, 'import: a GGUF file in the layout of Llama')


def import_() -> None:
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
  workdir = _workdir()
  if OUT.value is None:
    raise UserError('--out: which folder shall be made? e.g. --out=exported')
  out = paths.folder('out', OUT.value)
  kind = exporting.export(workdir, out, FORMAT.value)
  print(f'{out}: {kind}; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})')


def _workdir():
  if WORKDIR.value is None:
    raise UserError('--workdir: which run? e.g. --workdir=runs/imported')
  return paths.folder('workdir', WORKDIR.value)


COMMANDS = {'import': import_, 'export': export}


def command(argv: list[str]) -> tuple[str, list[str]]:
  """The word behind the program's name, and the arguments without it."""
  name = argv[1] if len(argv) > 1 else ''
  return (name, [argv[0], *argv[2:]]) if not name.startswith('-') else ('', argv)


if __name__ == '__main__':
  NAME, ARGV = command(sys.argv)

  def main() -> None:
    if NAME not in COMMANDS:
      raise UserError(f'{NAME or "command"}: choose one of {", ".join(COMMANDS)}')
    COMMANDS[NAME]()

  cli.run(main, ARGV)
