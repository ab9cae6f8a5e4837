"""What a layer keeps of its forward pass for the backward pass, by config.remat; the rest is
computed again there.

none      everything
latents   the layer's input, and what the cache would keep of each token: for MLA C + R elements, so
          no keys and values expanded from them. DeepSeek-V3 (arXiv 2412.19437, section 3.2.3) does
          this with its up-projections
block     the layer's input, and attention's output with the sums of its softmax: so attention, the
          part whose work grows with the square of the length, is not run again
full      the layer's input
"""

from collections.abc import Callable
from typing import Any

import jax

# The name that values have in a program (jax.ad_checkpoint.checkpoint_name).
LATENTS, ATTENTION = 'latents', 'attention'

# Whose results are attention's: cuDNN's, and through XLA's FFI the C++ for CPUs. The other backends
# name them.
KERNELS = ('dot_product_attention_fwd_wrapper', 'ffi_call')


def _attention(primitive, *_: Any, **params: Any) -> bool:
  return primitive.name in KERNELS or params.get('name') == ATTENTION


POLICIES: dict[str, Callable[..., Any]] = {
  'latents': jax.checkpoint_policies.save_only_these_names(LATENTS),
  'block': _attention,
  'full': jax.checkpoint_policies.nothing_saveable,
}
