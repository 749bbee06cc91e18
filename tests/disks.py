"""Disks that fail: what tests do to the `disk` that conftest.py gives them, and files out of reach."""

from __future__ import annotations

from pathlib import Path

OUT_OF_REACH = Path("/proc/self/mem")
"""Gives EIO when it is read from its start, as storage that does not answer: for links in the place of files."""


def fill(disk: Path) -> None:
    """Until nothing more can be written; removing the file `filler` makes room again."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return
