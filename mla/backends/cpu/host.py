"""What lets JAX run well on CPU cores, set before its first use."""

import ctypes
import math
import os
import sys
from collections.abc import Mapping

import jax

# glibc's mallopt parameters (malloc.h), and the largest value they take.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
LARGEST = 2**31 - 1
MADV_HUGEPAGE, HUGE = 14, 2**21  # linux/mman.h; bytes of a huge page on x86-64 and most ARM
DEVICE_COUNT = 'xla_force_host_platform_device_count'  # a flag of XLA's; config.update overrules it
HEAP = 2**30  # bytes the heap grows by; only what is touched becomes memory
BLOCK = 2**20  # bytes from which return_freed_memory gives a block back


def use_devices(rows: int, cores: int, mesh: Mapping[str, int], threaded: bool) -> None:
  """Has `cores` cores work on a batch of `rows`. Touches no GPU or TPU.

  With attention in C++ (threaded) one device's threads keep all cores busy. Without, one device a
  core, as far as the rows split over them: 1.2 times faster than one with two threads, though
  devices now and then wait for each other where they add up their gradients (docs/log.md). A mesh
  (config.mesh) that asks for several devices gets them, up to one a core: slower, but it shows the
  sharding. Devices that the user asked JAX for, by JAX_NUM_CPU_DEVICES or XLA_FLAGS, stay as they
  are.
  """
  if 'JAX_NUM_CPU_DEVICES' in os.environ or DEVICE_COUNT in os.environ.get('XLA_FLAGS', ''):
    return
  devices = 1 if threaded else max(n for n in range(1, cores + 1) if rows % n == 0)
  asked = math.prod(size for size in mesh.values() if size > 0)
  jax.config.update('jax_num_cpu_devices', asked if 1 < asked <= cores else devices)


def keep_freed_memory() -> None:
  """Lets malloc keep what it has, rather than return it to the system after every step.

  XLA allocates a program's working memory anew at each call. By default glibc maps and unmaps it
  each time, and the page faults cost a third of a training step (docs/log.md). One arena, because
  the others hold no block above 64 MB. The heap still grows for some hundred steps until it has a
  hole for every block; huge pages make that growth 512 times fewer faults. Only glibc has the
  call; elsewhere nothing happens.
  """
  libc = _glibc()
  if libc is None:
    return
  for parameter, value in (
    (M_MMAP_MAX, 0),
    (M_TRIM_THRESHOLD, LARGEST),
    (M_ARENA_MAX, 1),
    (M_TOP_PAD, HEAP),
  ):
    libc.mallopt(parameter, value)
  libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
  block = libc.malloc(ctypes.c_size_t(HEAP // 8))  # the heap grows now
  if block is None:  # a limit on this process's memory
    return
  libc.free(ctypes.c_void_p(block))
  start, end = -(-block // HUGE) * HUGE, libc.sbrk(0) // HUGE * HUGE
  libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), MADV_HUGEPAGE)


def return_freed_memory() -> None:
  """Has malloc return each large block as it is freed, for work that has to hold little.

  By default it keeps in every thread's arena what that has freed, up to 64 MB: once a checkpoint
  was read, by as many threads as it has pieces, 100 to 300 MB beside the 320 in use (docs/log.md).
  """
  libc = _glibc()
  if libc is not None:
    libc.mallopt(M_MMAP_THRESHOLD, BLOCK)  # which then no longer grows, as it does by default


def _glibc() -> ctypes.CDLL | None:
  """The C library, where it has mallopt."""
  libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
  return libc if hasattr(libc, 'mallopt') else None
