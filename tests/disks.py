"""What tests do to the `disk` that conftest.py gives them."""

from __future__ import annotations

from pathlib import Path


def fill(disk: Path) -> None:
    """Until nothing more can be written; removing the file `filler` makes room again."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return
