"""The files of sources, on a disk or in an object store.

Readers get the same file objects for both. From a store, they read the ranges that they ask for,
and nothing is copied to the disk.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, TypeVar

from megaconsa import reading
from megaconsa.data.store_connections import PACKAGES, Connection, Ranges, Status, connection
from megaconsa.errors import InputError
from megaconsa.object_store import store_error
from megaconsa.remote_path import RemotePath, is_remote

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Result = TypeVar("Result")
BUFFER_BYTES = 1 << 20
"""Bytes that are read from a store at a time, where less is asked for."""
REQUEST_BYTES = 8 << 20
"""Bytes that are read from a store at a time, where more is asked for."""

_known: dict[Path, Status] = {}
"""The files in stores that were looked at. Forked processes inherit it and need not ask again."""
_listed: set[Path] = set()
"""The folders in stores of which all files are known."""


def path_of(source: str) -> Path:
    """The path of a file or folder that a user names.

    Raises InputError for an address of a store that cannot hold sources.
    """
    if is_remote(source) or "://" in source:
        scheme = source.partition(":/")[0]
        if scheme not in PACKAGES:
            stores = ", ".join(f"{name}://" for name in PACKAGES)
            raise InputError(
                f"source {source}: files are read from a disk, {stores}; "
                f"copy those of {scheme}:// to one of them, or mount their store"
            )
    return RemotePath(source) if is_remote(source) else Path(source)


def forget() -> None:
    """Forgets what was known about files in stores, because it may have changed."""
    _known.clear()
    _listed.clear()


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    if not isinstance(path, RemotePath):
        return path.is_file()
    if path in _known:
        return True
    # The parts before a file are a scheme and a bucket at least.
    if len(path.parts) < 3 or not _listed.isdisjoint(path.parents):
        return False
    found = _ask(lambda store: store.look(path), path)
    if found is not None:
        _known[path] = found
    return found is not None


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    if not isinstance(path, RemotePath):
        return path.is_dir()
    return _ask(lambda store: store.is_folder(path), path)


def status(path: Path) -> Status:
    """What tells whether a file was replaced. Raises OSError where there is no such file."""
    if not isinstance(path, RemotePath):
        found = path.stat()
        return Status(found.st_size, found.st_mtime_ns)
    if not is_file(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return _known[path]


def list_folder(folder: Path) -> None:
    """Asks a store for all files of a folder at once, unless they are known or it is on a disk."""
    if isinstance(folder, RemotePath) and _listed.isdisjoint((folder, *folder.parents)):
        for name, found in _ask(lambda store: list(store.walk(folder)), folder):
            # A name such as a//b is no path. A mount of the store would not show it either.
            if PurePosixPath(name).parts == tuple(name.split("/")):
                _known[folder / name] = found
        _listed.add(folder)


def visible_files(folder: Path) -> Iterator[Path]:
    """The paths, relative to the folder, of the files below it that are not hidden."""
    if not isinstance(folder, RemotePath):
        yield from _visible_on_disk(folder)
        return
    list_folder(folder)
    depth = len(folder.parts)
    for path in list(_known):
        inner = path.parts[depth:]
        if path.parts[:depth] == folder.parts and not any(map(_is_hidden, inner)):
            yield Path(*inner)


def open_file(path: Path) -> IO[bytes]:
    """Opens a file for reading.

    A store that does not respond is waited for. Raises UnreachableError where it stays away,
    InputError where it refuses access, and OSError as for a file on a disk.
    """
    if not isinstance(path, RemotePath):
        return path.open("rb")
    return io.BufferedReader(_RemoteFile(path, status(path).size), BUFFER_BYTES)


def read_bytes(path: Path) -> bytes:
    """The content of a file, with retries as in `patiently`. Raises OSError as `open_file` does."""
    if not isinstance(path, RemotePath):
        return reading.read_bytes(path, within=path.parent)
    with open_file(path) as file:
        return file.read()


class _RemoteFile(io.RawIOBase):
    """A file in a store. Each read continues where the last one ended, on a new connection too."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path = path
        self._size = size
        self._place = 0
        self._ranges: Ranges | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = base + offset
        return self._place

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        count = min(len(view), REQUEST_BYTES, max(0, self._size - self._place))
        if not count:
            return 0
        content = _ask(lambda store: self._read(store, count), self._path)
        view[: len(content)] = content
        self._place += len(content)
        return len(content)

    def readall(self) -> bytes:
        content = bytearray(max(0, self._size - self._place))
        view = memoryview(content)
        while view:
            view = view[self.readinto(view) :]
        return bytes(content)

    def close(self) -> None:
        self._ranges = None
        super().close()

    def _read(self, store: Connection, count: int) -> bytes:
        """Some bytes from the place on, at least one."""
        ranges = self._ranges or store.open(self._path)
        # A file that has failed is opened anew.
        self._ranges = None
        content = ranges(self._place, count)
        if not 0 < len(content) <= count:
            if store.look(self._path) != _known[self._path]:
                raise InputError(
                    f"{self._path}: it was replaced while it was read; run the command again"
                )
            raise OSError(errno.EREMOTEIO, f"{len(content)} bytes came in place of {count}")
        self._ranges = ranges
        return content


def _ask(call: Callable[[Connection], Result], path: RemotePath) -> Result:
    """Asks the store of a path, and waits while it is out of reach. Returns what `call` returns.

    Raises UnreachableError where the store stays away, and InputError where it refuses access.
    """

    def once() -> Result:
        try:
            return call(connection(path))
        except InputError:
            raise
        except Exception as error:
            raise store_error(error, path, PACKAGES[path.scheme]) from error

    try:
        return reading.patiently(once, path)
    except PermissionError as error:
        raise InputError(
            f"{path}: access is refused, or credentials are missing ({error.strerror}); "
            "set them in the environment"
        ) from error


def _visible_on_disk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        # A link may lead to a folder above it.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            path = Path(place, name)
            if not _is_hidden(name) and path.is_file():
                yield path.relative_to(folder)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
