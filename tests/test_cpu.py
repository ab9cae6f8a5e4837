"""The CPU settings do what they say, each seen in a fresh process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, jax, jax.numpy as jnp
from mla import cpu
if {keep}:
  cpu.keep_freed_memory()
cpu.use_cores(1)
f = jax.jit(lambda x: jnp.sum((x @ x.T) @ x))  # works in 64 MB
x = jnp.ones((4096, 256))
for _ in range(5):
  f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
  f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str) -> str:
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_kept_memory_is_not_faulted_in_again():
  usual, kept = (int(run(FAULTS.format(keep=keep))) for keep in (False, True))
  assert usual > 10_000  # pages of 4 kB: at least 40 MB
  assert kept < usual / 10


@pytest.mark.parametrize('rows', [1, 16])
def test_devices_divide_the_rows(rows):
  code = f'import jax; from mla import cpu; cpu.use_cores({rows}); print(jax.device_count())'
  devices = int(run(code))
  assert rows % devices == 0
  assert rows > 1 or devices == 1
