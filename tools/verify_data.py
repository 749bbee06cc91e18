"""`megaconsa verify-data`: checks that every byte of a data folder is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, end_on, progress, run_tool


def main(
    path: Annotated[Path, typer.Argument(metavar="DATA", help="A folder that prepare-data made")],
) -> None:
    """Checks every shard of a data folder: presence, size, hashes, number of sequences, token
    ids; and the tokenizer.

    Prints each fault with its file and ends with exit code 1 if there is any.

    Example: megaconsa verify-data data/python
    """
    from megaconsa.data.dataset_info import DatasetInfo

    # It refuses what is no data folder. Heavy modules are imported after that.
    DatasetInfo.load(path)
    from megaconsa.data.shards import verify

    with progress("verifying", None, "shards") as task:
        faults = verify(path, task)
    end_on(faults)
    console.print(f"{path}: all shards are intact", markup=False)


if __name__ == "__main__":
    run_tool(main)
