"""Where data from an object store is kept on a node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CACHE_GIB = 32.0
"""Default limit of the cache in GiB. It holds two windows of 64 shards four times."""


@dataclass(frozen=True)
class CacheSettings:
    """The cache of a node. All processes on the node share it."""

    folder: Path | None = None
    """None means a folder of the user in the system's temporary folder."""
    gib: float = CACHE_GIB
    """Limit of the size of all shards in it, in GiB."""

    @property
    def limit(self) -> int:
        """The limit in bytes."""
        return int(self.gib * 2**30)


DEFAULT_CACHE = CacheSettings()
