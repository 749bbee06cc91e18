"""Downloads from object stores, and errors of stores that say what to do about them.

The downloaders are those of mosaicml-streaming. Each store has exceptions of its own.
"""

from __future__ import annotations

import errno
import os
import re
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from megaconsa.errors import InputError
from megaconsa.remote_path import PACKAGES, RemotePath

TIMEOUT_SECONDS = 60.0
"""Time limit for a store to send the next bytes."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors of the disk that a download is written to."""
NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),
    *("CredentialUnavailableError", "ClientAuthenticationError"),
}
"""Exceptions of botocore and of Azure."""
REASON_LENGTH = 300
"""The most characters of a store's message that are shown. Some have a page."""
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)|HTTP status 40[013]"
    r"|Status\((PERMISSION_DENIED|UNAUTHENTICATED)|Could not create a OAuth2 access token"
)
"""Refusals of S3 and Google. pyarrow puts them into the text of its exceptions only."""


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
            raise store_error(error, remote, PACKAGES[self._scheme]) from error


def store_error(error: Exception, remote: RemotePath, package: str) -> Exception:
    """The exception that says in our terms what one of a store's package says.

    remote: the file or folder.
    package: what must be installed to read it.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    if isinstance(error, ImportError):
        return InputError(
            f"{remote}: reading from {remote.scheme}:// needs a package that is missing "
            f"({error}); install it with pip install {package}"
        )
    reason = shorten(str(error), REASON_LENGTH, placeholder=" ...") or type(error).__name__
    status = _status(error)
    if status is None and type(error).__name__ in NO_CREDENTIALS:
        return InputError(f"{remote}: no credentials ({reason}); set them in the environment")
    if status == 404 or (status is None and _is_missing(error)):
        return FileNotFoundError(errno.ENOENT, reason)
    if status in (400, 401, 403) or _REFUSED.search(str(error)):
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
