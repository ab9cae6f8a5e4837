"""The CPU settings do what they say, each seen in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

from mla.backends import core_count

FAULTS = """
import resource, jax, jax.numpy as jnp
from mla import backends
from mla.backends.cpu import host
if not {keep}:
  host.keep_freed_memory = lambda: None
backends.prepare(1)
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


PINNED = """
import re
from mla.backends.cpu import host
if {returned}:
  host.return_freed_memory()
def held():
  return int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024
before = held()
small = []
for _ in range(2):  # by the second time malloc has learnt that blocks of 4 MB come and go
  blocks = []
  for _ in range(20):
    blocks.append(b'1' * 2**22)
    small.append(b'1' * 2**19)  # stays, and lies between them where all lie on the heap
  del blocks
print(held() - before - len(small) // 2)  # MB that nobody uses
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_returned_memory_is_held_no_longer():
  usual, returned = (int(run(PINNED.format(returned=returned))) for returned in (False, True))
  assert usual > 40  # of 80 MB
  assert returned < 10


HUGE = """
import re
from mla.backends.cpu import host
host.keep_freed_memory()
held = [b'1' * 2**27 for _ in range(7)]  # 896 MB, most of what the heap has grown by; not numpy's,
# which asks for huge pages itself
heap = re.findall(r'\\[heap\\]\\n(?:.+: .+\\n)+', open('/proc/self/smaps').read())
sizes = {part: int(re.search(r'^Rss: +(\\d+)', part, re.M)[1]) for part in heap}
asked = sum(size for part, size in sizes.items() if ' hg ' in part)  # MADV_HUGEPAGE
print(asked / sum(sizes.values()))
"""
THP = Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.mark.skipif(not THP.exists(), reason='the kernel has no huge pages to ask for')
def test_the_first_large_arrays_lie_where_huge_pages_are_asked_for():
  assert float(run(HUGE)) > 0.9


SCARCE = """
import re, resource
from mla.backends.cpu import host
used = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**26, used + 2**26))
host.keep_freed_memory()
print('went on')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_where_the_heap_may_not_grow_it_goes_on_without():
  assert run(SCARCE) == 'went on\n'


def devices(call: str) -> int:
  return int(
    run(f'import jax; from mla import backends; backends.{call}; print(jax.device_count())')
  )


@pytest.mark.parametrize('rows', [1, 16])
def test_devices_divide_the_rows(rows):
  there = devices(f'prepare({rows})')
  assert rows % there == 0
  assert rows > 1 or there == 1


@pytest.mark.skipif(core_count() < 2, reason='one core')
@pytest.mark.parametrize('mesh', [{'data': 2, 'tensor': 1}, {'data': -1, 'tensor': 2}])
def test_a_mesh_of_two_finds_two_devices(mesh):
  assert devices(f'prepare(2, mesh={mesh})') == 2


def test_a_mesh_beyond_the_cores_gets_no_devices_of_its_own():
  mesh = {'data': core_count() + 1}
  assert devices(f'prepare(1, mesh={mesh})') == 1
