"""`megaconsa verify-data`: is every byte of a data folder what was written?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, progress, run_tool


def main(path: Annotated[Path, typer.Argument(metavar="DATA", help="A folder that prepare-data made")]) -> None:
    """Checks every shard of a data folder: presence, size, hashes, number of sequences, token ids; and the tokenizer.

    Prints each fault with its file and ends with exit code 1 if there is any.

    Example: megaconsa verify-data data/python
    """
    from megaconsa.data.shards import verify

    with progress("verifying", None, "shards") as task:
        faults = verify(path, task)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise typer.Exit(1)
    console.print(f"{path}: all shards are intact", markup=False)


if __name__ == "__main__":
    run_tool(main)
