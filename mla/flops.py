"""FLOPs of a traced program, its loops multiplied out, which XLA's own count does not do; and what
training a model is worth, for MFU."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from mla import backends
from mla import model as model_lib


class Flops(NamedTuple):
  """Of matrix products, everything else being small beside them."""

  known: int  # in loops whose number of turns the jaxpr knows, and in none
  turn: int  # in one turn of each `while` loop, of which it does not

  def __add__(self, other: Any) -> 'Flops':
    return Flops(self.known + other.known, self.turn + other.turn)

  def times(self, turns: int) -> 'Flops':
    return Flops(self.known * turns, self.turn * turns)


def count(jaxpr: core.Jaxpr) -> Flops:
  """The products' FLOPs, 2 a multiplication and addition; of a conditional its costliest branch."""
  total = Flops(0, 0)
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      sizes = [_array(equation.invars[0]).shape[axis] for axis in contracted]
      total += Flops(2 * _array(equation.outvars[0]).size * math.prod(sizes), 0)
    elif name == 'cond':
      total += max(count(branch.jaxpr) for branch in params['branches'])
    elif name == 'while':
      total += Flops(0, sum(count(params['body_jaxpr'].jaxpr)))
    else:
      turns = params['length'] if name == 'scan' else 1
      for inner in _inner(params):
        total += count(inner).times(turns)
  return total


def worth(model: model_lib.Decoder, length: int) -> float:
  """What training is worth a token, in FLOPs, in windows of `length` tokens; abstract models do.

  Three times the forward pass's products, attention counted where a token may look: so 6 a weight
  that multiplies, and 6 a (query and value) dim of each head and visible position (Kaplan et al.
  2020, arXiv 2001.08361; PaLM, arXiv 2204.02311, appendix B, which counts the whole square). What
  remat and attention's own backward pass compute again is worth nothing.
  """
  graphdef, params = nnx.split(model)

  def forward(params, window):
    return model_lib.forward(nnx.merge(graphdef, params), window)

  window = jax.ShapeDtypeStruct((1, length), jnp.int32)
  with backends.counted():  # attention is one block of the whole square, in loops of unknown length
    found = count(jax.jit(forward).trace(params, window).jaxpr.jaxpr)
  return 3 * (found.known / length + found.turn * causal(length) / length)


def causal(length: int) -> float:
  """The share of attention's square that a causal mask leaves."""
  return (length + 1) / (2 * length)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def _array(variable: core.Var | core.Literal) -> jax.core.ShapedArray:
  assert isinstance(variable.aval, jax.core.ShapedArray)
  return variable.aval
