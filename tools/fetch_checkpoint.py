"""`megaconsa fetch-checkpoint`: copies a checkpoint from an object store into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, progress, run_tool


def main(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="The checkpoint in the store: .../step_N, as it was uploaded"
        ),
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to copy it into")],
) -> None:
    """Copy a checkpoint from an object store and verify it.

    The run then resumes from it with its own command. It may also be named as model.init_from.
    Copies are made by checkpoint.upload.

    Example: megaconsa fetch-checkpoint s3://bucket/runs/one/step_1000 runs/one
    """
    from megaconsa.checkpoint.remote import fetch

    with progress("fetching", None, "MiB") as task:
        path = fetch(checkpoint, run, lambda count: task.advance(count / 2**20))
    console.print(f"{path} is fetched and verified", markup=False)


if __name__ == "__main__":
    run_tool(main)
