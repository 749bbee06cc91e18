"""The cache of a data folder in an object store. The processes of a node share it.

    ROOT/HASH/            HASH of the remote path
      dataset.json
      tokenizer/
      train/              index.json and the shards that were needed last

Files are downloaded when they are needed, by one process of the node. Each becomes visible whole,
by a rename. Shards are checked before that, by the size and hash in the index.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash

from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.cache_space import CacheSpace, download_folder
from megaconsa.data.flat_shard import FlatRecord, FlatShard
from megaconsa.data.shard_file import HASH
from megaconsa.errors import DataError, InputError, RunError, UnreachableError
from megaconsa.object_store import DISK_ERRORS, ObjectStore
from megaconsa.reading import patiently, read_bytes
from megaconsa.remote_path import RemotePath, is_remote

BLOCK = 1 << 22
"""Bytes that are hashed at a time."""


class RemoteFolder:
    """A data folder in an object store."""

    def __init__(self, remote: Path, settings: CacheSettings) -> None:
        """Nothing is downloaded yet. Raises InputError if the cache cannot be made."""
        self.remote = RemotePath(remote)
        root = settings.folder or _default_root()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_ours = settings.folder is not None or root.stat().st_uid == os.getuid()
        except OSError as error:
            raise InputError(f"data.cache={root}: cannot be made ({error.strerror})") from error
        if not is_ours:
            raise InputError(f"data.cache: {root} belongs to another user; name another folder")
        self.root = root
        self.settings = settings
        self.local = root / xxhash.xxh3_64_hexdigest(str(self.remote))
        self._space = CacheSpace(root, settings.limit)
        self._store = ObjectStore(self.remote.scheme)

    def file(self, name: str) -> Path:
        """The local copy of a file that says what the folder holds.

        name: relative to the folder.

        Raises InputError if the store does not have or show it, UnreachableError if the store
        stays away, and RunError if the cache's disk is full.
        """
        final = self.local / name
        remote = self.remote / name

        def download() -> None:
            with download_folder(final) as part:
                if not final.exists():
                    self._store.download(remote, part / "file")
                    os.replace(part / "file", final)

        if not final.exists():
            try:
                self._written(download, remote)
            except FileNotFoundError as error:
                raise InputError(
                    f"data {self.remote}: it has no {name}; "
                    "upload a whole folder made by `megaconsa prepare-data`"
                ) from error
            except PermissionError as error:
                raise InputError(f"data {remote}: access is refused ({error.strerror})") from error
        return final

    def files(self, folder: str, names: tuple[str, ...]) -> Path:
        """The local copy of those files of a folder that the store has.

        Raises as `file` does. The first of `names` must be there.
        """
        for name in names:
            try:
                self.file(f"{folder}/{name}")
            except InputError:
                if name == names[0]:
                    raise
        return self.local / folder

    def fetch(self, split: str, record: FlatRecord, *, once: bool = False) -> Path:
        """The local copy of a shard.

        once: whether to give up at the first failure, for downloads ahead of need.

        Raises DataError if the store does not have it, or if the download is damaged. Raises
        UnreachableError if the store stays away or refuses access. Raises RunError if the cache's
        disk is full. With `once`, raises OSError where the store does not respond.
        """
        final = self.local / split / record.name
        remote = self.remote / split / record.name

        def download() -> None:
            with download_folder(final) as part:
                if not final.exists():
                    self._space.reserve(part, record.size)
                    self._store.download(remote, part / "file")
                    _check(part / "file", record, remote)
                    os.replace(part / "file", final)

        if final.exists():
            return final
        try:
            if once:
                download()
            else:
                self._written(download, remote)
        except FileNotFoundError as error:
            raise DataError(f"{remote}: shard is missing from its store") from error
        except PermissionError as error:
            raise UnreachableError(
                f"{remote}: access is refused ({error.strerror}); "
                "the same command continues with valid credentials"
            ) from error
        except DataError as error:
            # The reader tries again.
            raise DataError(f"{error}; if the folder was made anew, remove {self.local}") from error
        return final

    def _written(self, download: Callable[[], None], remote: Path) -> None:
        """Calls `download`, with retries as in `patiently`. Raises RunError if the disk is full."""
        try:
            patiently(download, remote)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise RunError(
                f"data.cache={self.root}: {remote} could not be written ({error.strerror}); "
                "make room, lower data.cache_gib or name another folder"
            ) from error


class ShardCache:
    """The shards of a split in an object store."""

    def __init__(self, folder: RemoteFolder, split: str, largest: int) -> None:
        """largest: bytes of the largest shard."""
        self._folder = folder
        self._split = split
        half = folder.settings.limit // 2
        self.open_at_once = max(1, min(FlatShard.loaded_at_once, half // largest))
        """How many shards a process may have open. Open ones take half the cache at most."""

    def open(self, record: FlatRecord) -> int:
        """Opens a shard for reading, and downloads it before if necessary.

        Returns a file descriptor. The shard stays in the cache while it is open. Raises as
        RemoteFolder.fetch does.
        """
        while True:
            # It may be removed between these two calls.
            path = self._folder.fetch(self._split, record)
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            # The time of the last change is that of the last use.
            os.utime(file)
            return file

    def fetch_ahead(self, record: FlatRecord) -> None:
        """Downloads a shard that will be needed soon, or marks it as used if it is there.

        Raises OSError or RunError where that fails.
        """
        os.utime(self._folder.fetch(self._split, record, once=True))

    def discard(self, record: FlatRecord) -> None:
        """Removes the local copy of a shard, because it was found to be damaged."""
        (self._folder.local / self._split / record.name).unlink(missing_ok=True)


def read_description(folder: Path, name: str, settings: CacheSettings) -> bytes:
    """The content of a small file of a data folder, which may be in an object store.

    Raises OSError as read_bytes does, and for a folder in a store what RemoteFolder.file raises.
    """
    if is_remote(folder):
        return read_bytes(RemoteFolder(folder, settings).file(name))
    return read_bytes(folder / name)


def _default_root() -> Path:
    return Path(tempfile.gettempdir()) / f"megaconsa-data-{os.getuid()}"


def _check(file: Path, record: FlatRecord, remote: Path) -> None:
    """Raises DataError unless a downloaded shard is what the index promises."""
    size = file.stat().st_size
    if size != record.size:
        raise DataError(f"{remote}: shard has {size} bytes instead of {record.size}")
    digest = xxhash.xxh3_64()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    if digest.intdigest() != record.digest:
        raise DataError(f"{remote}: shard does not match its {HASH} hash, the file is damaged")
