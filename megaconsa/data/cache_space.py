"""The space of a node's cache: locked downloads, and removing what was not used for longest.

A download has a folder NAME.part, whose lock (flock) its process holds. The system releases the
lock when the process dies. A process that reads a shard holds a shared lock on the file.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megaconsa.files import binary_size

logger = logging.getLogger(__name__)

PART = ".part"
"""Suffix of the folder of a download."""
RESERVED = "reserved"
"""Empty file in such a folder. Its size is the one that the download will have."""
SHARD = ".mds"
"""Suffix of the files that may be removed."""


@contextmanager
def download_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder for the download of `final`, to one process at a time.

    The others wait. The folder is removed at the end.
    """
    part = final.with_name(final.name + PART)
    while True:
        # Raised also where another process has just removed it. It is then made in the next turn.
        with suppress(FileExistsError):
            part.mkdir(parents=True, exist_ok=True)
        held = _locked(part, fcntl.LOCK_EX)
        if held is not None:
            break
    try:
        # A process that died has left something.
        for left in part.iterdir():
            _remove(left)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _release(held)


class CacheSpace:
    """Keeps the shards in a cache below a limit."""

    def __init__(self, root: Path, limit: int) -> None:
        """root: holds a folder for each remote folder. limit: in bytes."""
        self._root = root
        self._limit = limit
        self._warned = False

    def reserve(self, part: Path, size: int) -> None:
        """Makes room for a download, and keeps it until its folder is removed.

        part: from `download_folder`.
        size: in bytes.

        Removes the shards that were opened least recently, but none that a process has open. If
        that is not enough, warns once and exceeds the limit.
        """
        with (self._root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            free = self._limit - self._used()
            if free < size:
                free += self._evict(size - free)
            if free < size and not self._warned:
                self._warned = True
                logger.warning(
                    "data.cache_gib: the limit of %s is too small for the shards that are read "
                    "at a time, so %s exceeds it",
                    binary_size(self._limit),
                    self._root,
                )
            with (part / RESERVED).open("wb") as file:
                file.truncate(size)

    def _used(self) -> int:
        """Bytes of all shards and of all downloads under way. Removes downloads that have died."""
        used = sum(size for _, size, _ in self._shards())
        for part in self._root.glob(f"*/*/*{PART}"):
            held = _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if held is not None:
                shutil.rmtree(part, ignore_errors=True)
                _release(held)
            else:
                with suppress(FileNotFoundError):
                    used += (part / RESERVED).stat().st_size
        return used

    def _evict(self, needed: int) -> int:
        """Removes shards until `needed` bytes are free. Returns how many are."""
        freed = 0
        for _, size, shard in sorted(self._shards()):
            if freed >= needed:
                break
            held = _locked(shard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if held is not None:
                shard.unlink(missing_ok=True)
                _release(held)
                freed += size
        return freed

    def _shards(self) -> list[tuple[float, int, Path]]:
        """When each shard was last opened, its size in bytes, and its file."""
        found = []
        for shard in self._root.glob(f"*/*/*{SHARD}"):
            with suppress(FileNotFoundError):
                status = shard.stat()
                found.append((status.st_mtime, status.st_size, shard))
        return found


def _locked(path: Path, how: int) -> int | None:
    """Opens and locks a file or folder. Returns None if it is locked or gone."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, how)
        # Whoever held the lock before may have removed it.
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == _identity(held):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    _release(held)
    return None


def _identity(held: int) -> tuple[int, int]:
    status = os.fstat(held)
    return status.st_dev, status.st_ino


def _release(held: int) -> None:
    """Unlocks and closes a file."""
    # A forked process may have it open too. Closing alone would leave it locked.
    fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
