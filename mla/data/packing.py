"""Which tokens of a window are of one document: data.packing=documents."""

import bisect

import numpy as np
from jaxtyping import Int, Integer


def starts(
  documents: Integer[np.ndarray, ' d'], windows: Integer[np.ndarray, ' b'], length: int
) -> Int[np.ndarray, 'b T']:
  """Where in its window the document of each of `length` tokens begins; 0 if it does before.

  documents are the ascending places of all documents' first tokens in a stream, and windows those
  of the windows' in it.
  """
  found = np.zeros((len(windows), length), np.int32)
  for row, window in zip(found, map(int, windows), strict=True):
    # By halves, and not by numpy, which would copy places that lie in a file beside other things.
    first = bisect.bisect_right(documents, window)
    begun = documents[first : bisect.bisect_left(documents, window + length, first)] - window
    row[begun] = begun
  return np.maximum.accumulate(found, axis=1)
