"""The one exception a user is meant to see: no traceback, one sentence, exit code 2."""


class InputError(Exception):
    """A refused input. The message is one sentence that names the field or file, its value, and the mend."""
