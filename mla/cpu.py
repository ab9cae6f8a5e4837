"""What lets JAX run well on CPU cores; the entry points set it before JAX's first use."""

import ctypes
import os
import sys

import jax

# glibc's mallopt parameters (malloc.h), and the largest value they take.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX, LARGEST = -1, -4, -8, 2**31 - 1


def use_cores(rows: int) -> None:
  """One device a core, as far as `rows` of a batch split over them; touches no GPU or TPU.

  Two devices ran the small configs 1.2 times faster than one with two threads.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  devices = max(n for n in range(1, cores + 1) if rows % n == 0)
  jax.config.update('jax_num_cpu_devices', devices)


def keep_freed_memory() -> None:
  """Lets malloc keep what it has, rather than return it to the system after every step.

  XLA allocates a program's working memory anew at each call. By default glibc maps and unmaps it
  each time, and the page faults cost a third of a training step (docs/log.md). One arena, because
  the others hold no block above 64 MB. Only glibc has the call; elsewhere nothing happens.
  """
  if sys.platform != 'linux':
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, LARGEST)
    mallopt(M_ARENA_MAX, 1)
