"""The kinds of error a user is expected to meet, and the exit code of each."""

from collections.abc import Iterator


class UserError(Exception):
  """A mistake in what the user gave: one line that names the field or file, and the cure.

  The entry points print it on stderr without a traceback and exit with code 2.
  """


class Diverged(Exception):
  """Training produced a loss that is not finite; the last good checkpoint is kept. Exit code 1."""


class MachineError(Exception):
  """The machine could not go on: no space left, a limit reached, too little memory. Exit code 1.

  Nothing that was whole is lost; once the cause is mended, the same command goes on.
  """


def first_line(error: BaseException) -> str:
  """The start of what an exception of some library says, or its type if it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def causes(error: BaseException) -> Iterator[BaseException]:
  """An exception and those it came from, the nearest first; at most a hundred."""
  chain = [error]
  for cause in chain:  # grows on the way
    yield cause
    if len(chain) > 100:
      return
    if isinstance(cause, BaseExceptionGroup):
      chain += cause.exceptions
    before = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if before is not None:
      chain.append(before)
