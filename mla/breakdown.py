"""What an evaluation's losses are made of, by position and by what stood before; their interval."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

BOOTSTRAPS = 2000
# Of normal windows what is called 95 % covers 50 % with 2, 84 % with 5, 90 % with 10, 94 % with 20.
LEAST_WINDOWS = 20


def by_tokens_seen(
  values: Shaped[np.ndarray, 'W T'], starts: Int[np.ndarray, 'W T'] | None
) -> Shaped[np.ndarray, ' T']:
  """The values' sums over predictions that see 1, 2, ... T tokens."""
  if starts is None:
    return values.sum(axis=0)
  total = np.zeros(values.shape[1], np.result_type(values.dtype, int))
  np.add.at(total, np.arange(values.shape[1]) - starts, values)
  return total


def loss_by_position(
  nll: Float[np.ndarray, ' T'], targets: Int[np.ndarray, ' T']
) -> list[dict[str, Any]]:
  """The mean of targets that see 1, 2 to 3, 4 to 7, ... tokens, of by_tokens_seen of both."""
  found = []
  for power in range(len(nll).bit_length()):
    seen = slice(2**power - 1, 2 ** (power + 1) - 1)  # a window's first target sees one token
    count = int(targets[seen].sum())
    if count:
      last = min(2 ** (power + 1) - 1, len(nll))
      loss = float(nll[seen].sum() / count)
      found.append({'from': 2**power, 'to': last, 'loss': loss, 'targets': count})
  return found


def bigrams_seen(
  tokens: Int[np.ndarray, 'B window'], starts: Int[np.ndarray, 'B T'] | None = None
) -> Bool[np.ndarray, 'B T']:
  """Of each target, whether it and the token before it stood so earlier in the window, with
  `starts` in its document there."""
  seen = np.ones((len(tokens), tokens.shape[1] - 1), bool)
  wide = tokens.astype(np.int64)
  bigrams = wide[:, :-1] * (wide.max(initial=0) + 1) + wide[:, 1:]
  if starts is not None:  # those of another document are others
    bigrams = bigrams * tokens.shape[1] + starts
  for row, of_window in zip(seen, bigrams, strict=True):
    row[np.unique(of_window, return_index=True)[1]] = False
  return seen


def loss_by_bigram(
  nll_seen: float, nll: float, seen: int, targets: int
) -> dict[str, dict[str, Any]]:
  """The mean of the `seen` targets whose bigram stood earlier, and of the others; None of none.

  nll_seen is their sum, nll that of all.
  """
  sums = {'seen': (nll_seen, seen), 'new': (nll - nll_seen, targets - seen)}
  return {
    name: {'loss': float(total / count) if count else None, 'targets': count}
    for name, (total, count) in sums.items()
  }


def bootstrap_perplexity(
  nll: Float[np.ndarray, ' W'], targets: Int[np.ndarray, ' W'], resamples: int = BOOTSTRAPS
) -> list[float] | None:
  """exp of bootstrap_mean: that of the perplexity."""
  bounds = bootstrap_mean(nll, targets, resamples)
  return None if bounds is None else [float(bound) for bound in np.exp(bounds)]


def bootstrap_mean(
  sums: Shaped[np.ndarray, ' W'], targets: Int[np.ndarray, ' W'], resamples: int = BOOTSTRAPS
) -> list[float] | None:
  """The 95 % percentile interval [low, high] of sum sums / sum targets over windows.

  None of fewer than LEAST_WINDOWS windows.
  """
  if len(sums) < LEAST_WINDOWS:
    return None
  rng = np.random.default_rng(0)
  means = []
  for _ in range(resamples):
    drawn = rng.integers(0, len(sums), len(sums))
    means.append(sums[drawn].sum() / targets[drawn].sum())
  return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]
