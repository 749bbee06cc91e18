"""`megaconsa verify`: checks that every byte of a checkpoint is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, end_on, progress, run_tool


def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT", help="A run folder (all its checkpoints) or a checkpoint."
        ),
    ],
) -> None:
    """Check every file of a checkpoint, or of all checkpoints of a run, against its manifest:
    presence, size, checksum.

    Prints each fault with its file and ends with exit code 1 if there is any.

    Example: megaconsa verify runs/quickstart/train
    """
    from megaconsa.checkpoint import store
    from megaconsa.errors import InputError

    paths = [source] if (source / store.MANIFEST).exists() else store.committed(source)
    if not paths:
        raise InputError(f"{source} is neither a checkpoint nor a run folder that holds some")
    faults = []
    for path in paths:
        try:
            saved = store.read(path)
        except InputError as error:
            faults.append(str(error))
            continue
        with progress(f"verifying {path.name}", saved.bytes, "bytes") as task:
            faults += saved.faults(task.advance).values()
    end_on(faults)
    plural = "s" if len(paths) > 1 else ""
    console.print(
        f"{source}: {len(paths)} checkpoint{plural}, every file as it was written",
        markup=False,
    )


if __name__ == "__main__":
    run_tool(main)
