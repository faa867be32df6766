"""The two ways in which a run can end early, and the exit code that each one has."""


class UserError(ValueError):
    """A mistake of the user's: a flag, a file, a data set. The message says what, where and
    what to do; exit 2."""


class RunError(RuntimeError):
    """A run that could not go on: disk full, NaN loss, out of memory. The last checkpoint
    is intact; exit 1."""
