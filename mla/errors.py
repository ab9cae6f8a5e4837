"""The one kind of error a user is expected to meet."""


class UserError(Exception):
  """A mistake in what the user gave: one line that names the field or file, and the cure.

  The entry points print it on stderr without a traceback and exit with code 2.
  """


class Diverged(Exception):
  """Training produced a loss that is not finite; the last good checkpoint is kept. Exit code 1."""
