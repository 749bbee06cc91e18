"""Reading files that may be out of reach for a while.

A file server may restart, or a network path may fail over. A read that fails for such a reason says
nothing about the file, so it is retried for some minutes.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megaconsa.errors import UnreachableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
PATIENCE_SECONDS = 300.0
"""Time limit for a file to come into reach again."""
FIRST_PAUSE = 1.0
"""Pause after the first attempt in seconds."""
LONGEST_PAUSE = 30.0
"""Longest pause between two attempts in seconds. Each pause is twice the previous one."""
OUT_OF_REACH = {
    errno.EAGAIN,
    errno.ECOMM,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOLINK,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Errors of storage that does not respond.

Other errors, such as a missing file or missing permission, are valid answers of the storage."""


def patiently(read: Callable[[], Result], what: object, within: Path | None = None) -> Result:
    """Calls `read`, and retries it while the file is out of reach. Returns its result.

    what: names the file or folder in messages.
    within: a folder that existed before. While it is missing, a missing file only means that the
        folder's storage is away.
    Raises UnreachableError if the file stays out of reach. Raises all other exceptions of `read` at
    once.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = FIRST_PAUSE
    while True:
        try:
            return read()
        except OSError as error:
            if not is_out_of_reach(error, within):
                raise
            if time.monotonic() + pause > deadline:
                raise UnreachableError(
                    f"{what} could not be read for {PATIENCE_SECONDS:.0f} s ({error.strerror}); "
                    "the same command continues once its storage answers again"
                ) from None
            logger.warning("%s cannot be read (%s), trying again", what, error.strerror)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_out_of_reach(error: OSError, within: Path | None = None) -> bool:
    """Whether an error says nothing about the file.

    within: as in `patiently`.
    """
    if error.errno == errno.ENOENT and within is not None:
        try:
            return not within.is_dir()
        except OSError:
            return True
    return error.errno in OUT_OF_REACH


def read_bytes(path: Path, within: Path | None = None) -> bytes:
    """Reads a file, with retries as in `patiently`. Raises OSError as Path.read_bytes does."""
    return patiently(path.read_bytes, path, within)


def read_text(path: Path, within: Path | None = None) -> str:
    """Reads a text file, with retries as in `patiently`.

    Raises OSError and UnicodeDecodeError as Path.read_text does.
    """
    return patiently(path.read_text, path, within)
