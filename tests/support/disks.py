"""Disks that fail: what tests do to the fixture `disk`, and files out of reach."""

from __future__ import annotations

from pathlib import Path

OUT_OF_REACH = Path("/proc/self/mem")
"""A file that gives EIO when it is read from its start, like storage that does not answer.

Tests replace files by links to it.
"""


def fill(disk: Path) -> None:
    """Writes until the disk is full.

    Removing the file `filler` makes room again.
    """
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def damage_all_rows(shard: Path) -> None:
    """Overwrites the rows of a flat shard. The file keeps its size."""
    content = bytearray(shard.read_bytes())
    # The number of rows and the first offset, each in 4 bytes.
    begin = int.from_bytes(content[4:8], "little")
    content[begin:] = bytes(len(content) - begin)
    shard.write_bytes(content)
