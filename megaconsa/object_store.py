"""Downloads from object stores, with errors that say what to do about them.

The downloaders are those of mosaicml-streaming. Each store has exceptions of its own.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from megaconsa.errors import InputError
from megaconsa.remote_path import PACKAGES, RemotePath

TIMEOUT_SECONDS = 60.0
"""Time limit for a store to send the next bytes."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors of the disk that a download is written to."""
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
"""Exceptions of botocore."""


class ObjectStore:
    """Downloads single files of a store."""

    def __init__(self, scheme: str) -> None:
        """scheme: a key of PACKAGES. Nothing is connected yet."""
        self._scheme = scheme

    def download(self, remote: RemotePath, local: Path) -> None:
        """Downloads a file once, without retries of our own.

        local: must not exist. Its folder may hold other files afterwards.

        Raises FileNotFoundError if the store has no such file, and PermissionError if it does not
        show it. Raises another OSError, which `is_out_of_reach` knows, if the store does not
        respond, and the disk's own if that is full. Raises InputError if a package or credentials
        are missing.
        """
        try:
            downloader = connection(self._scheme, os.getpid())
            downloader.download(str(remote), str(local), timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._translated(error, remote) from error

    def _translated(self, error: Exception, remote: RemotePath) -> Exception:
        """The exception that says the same in our terms."""
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        if isinstance(error, ImportError):
            return InputError(
                f"{remote}: reading from {self._scheme}:// needs a package that is missing "
                f"({error}); install it with pip install {PACKAGES[self._scheme]}"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        if type(error).__name__ in NO_CREDENTIALS:
            return InputError(f"{remote}: no credentials ({reason}); set them in the environment")
        status = _status(error)
        if status == 404 or (status is None and _is_missing(error)):
            return FileNotFoundError(errno.ENOENT, reason)
        if status in (400, 401, 403):
            return PermissionError(errno.EACCES, reason)
        return OSError(errno.EREMOTEIO, reason)


@lru_cache
def connection(scheme: str, process: int) -> Any:
    """streaming's downloader of a kind of store.

    process: its number. A forked process must not share connections with its parent.
    """
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(f"{scheme}://")


def _status(error: Exception) -> int | None:
    """The HTTP status that an exception of some store's package holds, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        candidates = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        candidates = [getattr(response, "status_code", None)]
    candidates += [getattr(error, name, None) for name in ("status_code", "status", "code")]
    return next((found for found in candidates if isinstance(found, int)), None)


def _is_missing(error: Exception) -> bool:
    """Whether an exception without a status says that there is no such file."""
    # huggingface_hub raises this one, which is also a FileNotFoundError, when it is offline.
    offline = type(error).__name__ == "LocalEntryNotFoundError"
    return isinstance(error, FileNotFoundError) and not offline
