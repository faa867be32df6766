"""The two ways in which a run can fail, and the exit code of each."""


class UserError(ValueError):
    """A mistake of the user's: a flag, a file, a data set. Exit 2; the message says what is wrong,
    where, and what to do."""


class RunError(RuntimeError):
    """A run that could not continue: disk full, NaN loss, out of memory. The last checkpoint is
    intact; exit 1."""


class LostWorker(RunError):
    """A process that reads data has died; what is computed from whole batches is not touched."""
