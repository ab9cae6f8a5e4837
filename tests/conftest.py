"""Eight CPU devices for every test, shape annotations checked for real, and the tiny models."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What one test, worker or subprocess has compiled, the others load. Set before JAX is imported; the
# workers and subprocesses inherit it.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix='mla-lab-tests-')  # goes when this process does
  os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# A CPU, whatever there is; JAX_PLATFORMS=cuda asks for a GPU, for the tests of its kernels.
jax.config.update('jax_platforms', 'cuda' if os.environ.get('JAX_PLATFORMS') == 'cuda' else 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

install_import_hook('mla', 'beartype.beartype')  # before anything of mla is imported

from configs import base  # noqa: E402

TINY = {
  'num_layers': 2,
  'd_model': 32,
  'num_heads': 4,
  'head_dim': 6,
  'value_head_dim': 10,  # not N, nor N + R
  'ffn_dim': 24,
  'seq_len': 32,
  'batch_size': 8,
  'num_steps': 4,
  'warmup_steps': 1,
  'log_every': 1,
  'eval_every': 2,
  'checkpoint_every': 2,
}
# Twelve steps of a second or so, on the text below.
SHORT_RUN = {
  'num_layers': 1,
  'd_model': 16,
  'ffn_dim': 16,
  'seq_len': 16,
  'num_steps': 12,
  'warmup_steps': 2,
  'data.eval_tokens': 64,
}
ARMS = {
  'mha': {'attention': 'mha'},
  'mha_partial_rope': {'attention': 'mha', 'rope_dim': 2},
  'gqa': {'attention': 'gqa', 'num_kv_heads': 2},
  'mqa': {'attention': 'mqa'},
  'mla': {'attention': 'mla', 'latent_dim': 14, 'rope_dim': 4},
  'mla_query_latent': {
    'attention': 'mla',
    'latent_dim': 14,
    'rope_dim': 4,
    'query_latent_dim': 18,
  },
  'mla_nested': {
    'attention': 'mla',
    'latent_dim': 14,
    'rope_dim': 4,
    'query_latent_dim': 18,
    'nested': '4,8,14',
  },
}


def tiny_config(arm: str = 'mla', **changes):
  """A config of the conformance suite: an arm's fields on TINY's, and changes on both."""
  config = base.get_config()
  config.update({**TINY, **ARMS[arm]})
  config.update_from_flattened_dict({name.replace('__', '.'): v for name, v in changes.items()})
  return config


def texts_of(data, split: str) -> list[str]:
  """The documents of a split."""
  from mla.data import corpora

  return [str(raw, 'utf-8') for raw in corpora.open_documents(data, split)]


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
  """A mesh over the first of the eight devices: (data, fsdp, tensor)."""
  return jax.make_mesh(
    shape,
    ('data', 'fsdp', 'tensor'),
    devices=jax.devices()[: math.prod(shape)],
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def arrays_in(jaxpr) -> Iterator[jax.core.ShapedArray]:
  """Shape and dtype of every array a program computes, inner programs included."""
  for eqn in jaxpr.eqns:
    yield from (var.aval for var in eqn.outvars if hasattr(var.aval, 'shape'))
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from arrays_in(inner)


@contextlib.contextmanager
def plain_user():
  """As somebody who is refused what the permissions refuse, which root is not."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


def break_as(path: Path, damage: str | bytes) -> None:
  """Puts a damage in the place of a file: other content, or what the word says."""
  content = path.read_bytes()
  middle = len(content) // 2
  path.unlink()
  match damage:
    case 'gone':
      pass
    case 'folder':
      path.mkdir()
    case 'pipe':
      os.mkfifo(path)
    case 'link':
      path.symlink_to('nothing')
    case 'torn':
      path.write_bytes(content[:middle])
    case 'bit':
      path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    case 'zeros':  # behind what a file opens with
      path.write_bytes(content[:64] + bytes(3000) + content[3064:])
    case _:
      path.write_bytes(damage)


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(''.join(f'{n} bottles of beer on the wall\n' for n in range(2000)))
  return path


@pytest.fixture(params=ARMS)
def arm(request) -> str:
  return request.param
