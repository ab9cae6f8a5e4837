"""The kinds of error a user is expected to meet."""


class UserError(Exception):
  """A mistake in what the user gave: one line that names the field or file, and the cure.

  The entry points print it on stderr without a traceback and exit with code 2.
  """


def first_line(error: Exception) -> str:
  """The start of what an exception of some library says, or its type if it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Diverged(Exception):
  """Training produced a loss that is not finite; the last good checkpoint is kept. Exit code 1."""
