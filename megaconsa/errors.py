"""The exceptions that a user is meant to see, as one sentence without a traceback."""


class InputError(Exception):
    """A refused input. Exit code 2.

    The message is one sentence that names the field or file, its value, and the fix.
    """


class RunError(Exception):
    """Work that has started and cannot continue, for example because data is damaged. Exit code 1.

    The code is not at fault. The message is one sentence.
    """


class DataError(RunError):
    """Data on disk is not what was written. The message names the file. Exit code 1."""


class UnreachableError(RunError):
    """A file or a network cannot be reached at the moment. Exit code 76.

    The same command resumes the run later.
    """
