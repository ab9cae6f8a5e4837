"""Evaluates runs: perplexity read through the KV cache, against the bytes of that cache.

  python eval.py --workdir=runs/mla_small --workdir=runs/mha_small
  python eval.py --workdir=runs/mla_small --cache_dtype=float32,bfloat16,int8
  python eval.py --workdir=runs/mla_small --json=small.json --plot=small.png

Prints a table, a line a run, by the bytes of the caches; mla/evaluate.py states the protocol. With
--multihost it is one of several processes that read each run together, as train.py's train it; the
first prints and writes.
"""

# ruff: noqa: E402

from absl import flags

from mla import cli

WORKDIRS = flags.DEFINE_multi_string('workdir', [], 'a run; give it again for each further one')
CACHE_DTYPE = flags.DEFINE_string(
  'cache_dtype', 'bfloat16', 'float32, bfloat16 or int8; several with commas, a row each'
)
MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'about so many, in whole windows spread over the text; all when not given'
)
LATENT_DIM = flags.DEFINE_integer(
  'latent_dim',
  None,
  'of a nested latent so many dims; each of its widths, a row each, when not given',
)
LAYER_DIMS = flags.DEFINE_string(
  'layer_dims', None, 'of a nested latent as many dims as stand here for each layer: 64,32,16,8'
)
JSON = flags.DEFINE_string('json', None, 'write the figures here')
MULTIHOST = flags.DEFINE_bool('multihost', False, 'read as one of several processes, all alike')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'with --multihost: HOST:PORT of process 0')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'with --multihost: which of them this is')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'with --multihost: how many there are')
PLOT = flags.DEFINE_string(
  'plot', None, 'draw perplexity (of probes, accuracy) against bytes per token here (.png)'
)

if __name__ == '__main__':
  cli.begin(say='loading JAX')

from mla import backends, evaluate, files, hosts, paths, plots, tables
from mla.errors import UserError


def say(line: str) -> None:
  if hosts.is_first():
    print(line)


def main() -> None:
  if not WORKDIRS.value:
    raise UserError('--workdir: which run? e.g. --workdir=runs/mla_small')
  workdirs = [paths.folder('workdir', given) for given in WORKDIRS.value]
  json_file, plot_file = paths.output('json', JSON.value, 'runs'), paths.picture('plot', PLOT.value)
  paths.distinct(json=json_file, plot=plot_file)
  if LAYER_DIMS.value is not None and LATENT_DIM.value is not None:
    raise UserError('--layer_dims: is in place of --latent_dim; give one of the two')
  layers = evaluate.parse_layers(LAYER_DIMS.value) if LAYER_DIMS.value is not None else None
  for flag in (COORDINATOR, PROCESS_ID, NUM_PROCESSES):
    if flag.present and not MULTIHOST.value:
      raise UserError(f'--{flag.name}: goes with --multihost; add that, or leave it out')
  if MULTIHOST.value:
    hosts.join(COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value)
  backends.prepare(evaluate.BATCH)
  dtypes = list(dict.fromkeys(CACHE_DTYPE.value.split(',')))
  runs = [
    run
    for workdir in workdirs
    for run in evaluate.evaluate_caches(
      workdir, dtypes, say, MAX_TOKENS.value, LATENT_DIM.value, layers
    )
  ]
  if not hosts.is_first():
    return
  print('\n' + tables.compare(runs))
  if json_file:
    files.write_json(json_file, {'runs': runs})
  if plot_file:
    plots.save(plots.perplexity, plot_file, runs)


if __name__ == '__main__':
  cli.run(main)
