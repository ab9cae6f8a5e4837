"""AdamW with warm-up, cosine decay and clipping, from the config."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """Linear from 0 over warmup_steps, then a cosine down to a tenth of the peak at num_steps."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate / 10,
  )
  # A float32 step, or the rate would be float64 under jax_enable_x64.
  return lambda step: schedule(jnp.asarray(step, jnp.float32))


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Clips by the global norm, then AdamW; matrices decay, norms' gains do not.

  Updates are elementwise, so a fused or per-head layout of a projection learns the same.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.grad_clip),
    optax.adamw(
      make_schedule(config),
      b1=0.9,
      b2=0.95,
      weight_decay=config.weight_decay,
      mask=_is_matrix,
    ),
  )


def _is_matrix(params: nnx.State) -> nnx.State:
  """True for the weights with an input and an output axis, layers aside; False for gains."""
  return jax.tree.map(
    lambda leaf: leaf.replace(len(set(leaf.get_metadata('axes')) - {'L'}) > 1),
    params,
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
