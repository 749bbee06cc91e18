"""What both kinds of shards check about their file."""

from __future__ import annotations

from pathlib import Path

from megaconsa.reading import patiently

HASH = "xxh3_64"
COLUMN = "tokens"


def file_fault(path: Path, size: int) -> str | None:
    """What is wrong with a shard's file, or None. Only its presence and size are checked.

    size: bytes that the index promises.
    """
    try:
        found = patiently(path.stat, path).st_size
    except OSError as error:
        return f"{path}: shard cannot be found ({error.strerror})"
    if found != size:
        return f"{path}: shard has {found} bytes instead of {size}"
    return None
