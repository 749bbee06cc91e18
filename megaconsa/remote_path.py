"""Paths of folders in an object store, such as s3://bucket/folder."""

from __future__ import annotations

import re
from pathlib import Path, PosixPath

PACKAGES = {
    "s3": "boto3",
    "gs": "google-cloud-storage",
    "oci": "oci",
    "azure": "azure-storage-blob azure-identity",
    "azure-dl": "azure-storage-file-datalake azure-identity",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
}
"""The packages by which mosaicml-streaming reads from each kind of store."""

_REMOTE = re.compile(rf"({'|'.join(PACKAGES)}):/+[^/]")


class RemotePath(PosixPath):
    """A path in an object store. Its text is the address.

    pathlib joins repeated slashes, so the address is put together again.
    """

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}"

    @property
    def scheme(self) -> str:
        """The kind of store, a key of PACKAGES."""
        return self.parts[0].removesuffix(":")


def is_remote(path: str | Path) -> bool:
    """Whether a path leads into an object store. The slashes after its scheme may be joined."""
    return _REMOTE.match(str(path)) is not None


def with_address(path: Path) -> Path:
    """The path itself, or a RemotePath if it leads into an object store."""
    return RemotePath(path) if is_remote(path) else path
