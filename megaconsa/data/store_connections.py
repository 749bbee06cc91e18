"""Connections to object stores that hold sources: what is there, and ranges of files.

pyarrow connects to S3 and Google. It could connect to Azure too, but its connections there are
shared by forked processes, which then get each other's answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from megaconsa import object_store, remote_path
from megaconsa.errors import InputError
from megaconsa.remote_path import RemotePath

Ranges = Callable[[int, int], bytes]
"""The bytes of a file from a place on, as many as are asked for."""

PACKAGES = {
    "s3": "pyarrow",
    "gs": "pyarrow",
    "azure": remote_path.PACKAGES["azure"],
    "hf": remote_path.PACKAGES["hf"],
}
"""The stores that can hold sources, and the package that reads from each."""
CONNECTING_SECONDS = 10.0
"""Time limit for a connection, and for the retries of Google's library."""


class Status(NamedTuple):
    """What tells whether a file was replaced."""

    size: int
    """In bytes."""
    version: int | str
    """Time of the last change in nanoseconds, or a hash where the store has no such time."""


class Connection(Protocol):
    """A connection. Its methods raise what the package raises, which `store_error` knows."""

    def look(self, path: RemotePath) -> Status | None:
        """What tells whether a file was replaced. None where there is no such file."""

    def is_folder(self, path: RemotePath) -> bool:
        """Whether there is such a folder."""

    def walk(self, folder: RemotePath) -> Iterator[tuple[str, Status]]:
        """The files below a folder, by their names relative to it."""

    def open(self, path: RemotePath) -> Ranges:
        """Opens a file."""


def connection(path: RemotePath) -> Connection:
    """The connection of this process to the store of a path, whose scheme is in PACKAGES."""
    return connect(path.scheme, path.parts[1], os.getpid())


@lru_cache
def connect(scheme: str, root: str, process: int) -> Connection:
    """A connection.

    root: the bucket, or the host of Azure.
    process: its number. A forked process must not share connections with its parent.
    """
    if scheme == "hf":
        return _HuggingFace()
    if scheme == "azure":
        return _Azure(root)
    return _Arrow(_s3(root) if scheme == "s3" else _google())


class _Arrow:
    """A file system of pyarrow."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def look(self, path: RemotePath) -> Status | None:
        info = self._files.get_file_info(_name(path))
        return Status(info.size, info.mtime_ns) if info.is_file else None

    def is_folder(self, path: RemotePath) -> bool:
        return bool(self._files.get_file_info(_name(path)).type.name == "Directory")

    def walk(self, folder: RemotePath) -> Iterator[tuple[str, Status]]:
        from pyarrow.fs import FileSelector

        name = _name(folder)
        for info in self._files.get_file_info(FileSelector(name, recursive=True)):
            if info.is_file:
                yield info.path.removeprefix(f"{name}/"), Status(info.size, info.mtime_ns)

    def open(self, path: RemotePath) -> Ranges:
        opened = self._files.open_input_file(_name(path))
        return lambda begin, count: opened.read_at(count, begin)


class _HuggingFace:
    """Repositories of Hugging Face."""

    def __init__(self) -> None:
        from huggingface_hub import HfFileSystem

        self._files: Any = HfFileSystem()

    def look(self, path: RemotePath) -> Status | None:
        info = self._info(path)
        return Status(info["size"], info["blob_id"]) if info["type"] == "file" else None

    def is_folder(self, path: RemotePath) -> bool:
        return bool(self._info(path)["type"] == "directory")

    def walk(self, folder: RemotePath) -> Iterator[tuple[str, Status]]:
        self._files.invalidate_cache()
        # The branch is part of the names only if it is part of the address.
        above = self._files.resolve_path(_name(folder)).unresolve()
        for name, info in self._files.find(_name(folder), detail=True).items():
            yield name.removeprefix(f"{above}/"), Status(info["size"], info["blob_id"])

    def open(self, path: RemotePath) -> Ranges:
        # Its caches would read ahead by megabytes.
        opened = self._files.open(_name(path), "rb", cache_type="none")

        def read(begin: int, count: int) -> bytes:
            opened.seek(begin)
            content: bytes = opened.read(count)
            return content

        return read

    def _info(self, path: RemotePath) -> dict[str, Any]:
        self._files.invalidate_cache()
        try:
            info: dict[str, Any] = self._files.info(_name(path))
        except (FileNotFoundError, NotImplementedError):
            # The latter for the address of an owner.
            return {"type": None}
        return info


class _Azure:
    """The containers of a storage account of Azure."""

    def __init__(self, host: str) -> None:
        from azure.storage.blob import BlobServiceClient

        credential: Any = os.environ.get("AZURE_ACCOUNT_ACCESS_KEY")
        if not credential:
            from azure.identity import DefaultAzureCredential

            credential = DefaultAzureCredential()
        self._service = BlobServiceClient(
            f"https://{host}",
            credential=credential,
            connection_timeout=CONNECTING_SECONDS,
            read_timeout=object_store.TIMEOUT_SECONDS,
            # It would wait for 15 s even where credentials are missing.
            retry_total=0,
        )

    def look(self, path: RemotePath) -> Status | None:
        from azure.core.exceptions import ResourceNotFoundError

        if len(path.parts) < 4:
            return None
        try:
            found = self._blob(path).get_blob_properties()
        except ResourceNotFoundError:
            return None
        return None if _is_marker(found) else Status(found.size, found.etag)

    def is_folder(self, path: RemotePath) -> bool:
        from azure.core.exceptions import ResourceNotFoundError

        if len(path.parts) < 3:
            return False
        try:
            return any(True for _ in self._below(path))
        except ResourceNotFoundError:
            return False

    def walk(self, folder: RemotePath) -> Iterator[tuple[str, Status]]:
        prefix = _prefix(folder)
        for found in self._below(folder):
            if not _is_marker(found):
                yield found.name.removeprefix(prefix), Status(found.size, found.etag)

    def open(self, path: RemotePath) -> Ranges:
        blob = self._blob(path)
        return lambda begin, count: blob.download_blob(begin, count).readall()

    def _blob(self, path: RemotePath) -> Any:
        return self._service.get_blob_client(path.parts[2], "/".join(path.parts[3:]))

    def _below(self, folder: RemotePath) -> Any:
        container = self._service.get_container_client(folder.parts[2])
        return container.list_blobs(_prefix(folder), include=["metadata"])


def _prefix(folder: RemotePath) -> str:
    """With what the names of all blobs in a folder begin."""
    return "".join(f"{part}/" for part in folder.parts[3:])


def _is_marker(blob: Any) -> bool:
    """Whether a blob stands for a folder."""
    return "hdi_isfolder" in (blob.metadata or {}) or blob.name.endswith("/")


def _name(path: RemotePath) -> str:
    """The path in a store: an address without its scheme."""
    return "/".join(path.parts[1:])


def _s3(bucket: str) -> Any:
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    # The variable of mosaicml-streaming, and that of Amazon's own libraries.
    endpoint = os.environ.get("S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        return S3FileSystem(
            endpoint_override=endpoint, scheme=urlsplit(endpoint).scheme, **_time_limits()
        )
    try:
        return S3FileSystem(region=resolve_s3_region(bucket), **_time_limits())
    except OSError as error:
        if str(error).endswith("not found"):
            raise InputError(f"s3://{bucket}: there is no such bucket, name another") from error
        raise


def _google() -> Any:
    from pyarrow.fs import GcsFileSystem, S3FileSystem

    if "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:
        # Google's store speaks S3 too, and such keys are for that.
        return S3FileSystem(
            access_key=os.environ["GCS_KEY"],
            secret_key=os.environ["GCS_SECRET"],
            region="auto",
            endpoint_override="https://storage.googleapis.com",
            **_time_limits(),
        )
    return GcsFileSystem(retry_time_limit=timedelta(seconds=CONNECTING_SECONDS))


def _time_limits() -> dict[str, float]:
    return {
        "connect_timeout": CONNECTING_SECONDS,
        "request_timeout": object_store.TIMEOUT_SECONDS,
    }
