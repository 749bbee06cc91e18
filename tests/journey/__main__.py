"""`python -m tests.journey [FOLDER]`: walks, and prints each step with its exit code and time."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.journey.chapters import travel
from tests.journey.walk import Walk


def main(arguments: list[str]) -> None:
    """arguments: a new folder that is kept afterwards. Without it, a temporary one is removed."""
    if arguments:
        _walk(Path(arguments[0]).resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            _walk(Path(folder))


def _walk(folder: Path) -> None:
    walk = Walk(folder)
    try:
        travel(walk)
    finally:
        print(walk.listing())


if __name__ == "__main__":
    main(sys.argv[1:])
