"""The exception for everything that a person can mend."""


class InputError(ValueError):
  """Bad input: says what is wrong, where, what was expected, what to do.

  `main` prints its message without a traceback and exits with status 2.
  """
