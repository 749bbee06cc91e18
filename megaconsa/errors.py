"""The exceptions a user is meant to see: no traceback, one sentence."""


class InputError(Exception):
    """A refused input. The message is one sentence that names the field or file, its value, and the mend. Exit code 2."""


class RunError(Exception):
    """Work that had begun and cannot go on, through no fault of the code (damaged data, say). One sentence; exit code 1."""


class UnreachableError(RunError):
    """A file or a network cannot be reached at the moment. Exit code 76: the same command goes on
    later."""
