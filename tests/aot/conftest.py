"""What the compilers for machines that aren't here need, before JAX loads them."""

import os

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # or libtpu asks a metadata server, and waits
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
os.environ.setdefault('XLA_FLAGS', '--xla_gpu_autotune_level=0')  # nothing can be run
