"""Reading files that may be out of reach for a while, because a file server restarts or a network
path fails over.

A read that fails for such a reason says nothing about the file. It is tried again for some minutes.
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
"""For a file to come into reach again."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""Seconds between two attempts; each pause is twice the one before."""
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
"""Errors of storage that does not answer. Others (no such file, no permission) are answers."""


def patiently(read: Callable[[], Result], what: object, within: Path | None = None) -> Result:
    """The result of `read`, which may be called several times.

    what: names the file or folder in messages. within: a folder that was there before; while it is
    missing, a missing file only says that the folder's storage is away. Raises UnreachableError where
    the file stays out of reach, and whatever else `read` raises at once.
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
                    "the same command goes on once its storage answers again"
                ) from None
            logger.warning("%s cannot be read (%s), trying again", what, error.strerror)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_out_of_reach(error: OSError, within: Path | None = None) -> bool:
    """Whether an error says nothing about the file; `within` as in `patiently`."""
    if error.errno == errno.ENOENT and within is not None:
        try:
            return not within.is_dir()
        except OSError:
            return True
    return error.errno in OUT_OF_REACH


def read_bytes(path: Path, within: Path | None = None) -> bytes:
    """As `patiently`. Raises OSError as Path.read_bytes does."""
    return patiently(path.read_bytes, path, within)


def read_text(path: Path, within: Path | None = None) -> str:
    """As `patiently`. Raises OSError and UnicodeDecodeError as Path.read_text does."""
    return patiently(path.read_text, path, within)
