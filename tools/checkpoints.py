"""`megaconsa checkpoints`: lists what a run has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """List the checkpoints of a run, newest first: step, tokens, losses, size, date, and
    whether every file is there and of its size.

    It reads no tensors; `megaconsa verify` computes the checksums.

    Example: megaconsa checkpoints runs/quickstart/train
    """
    from rich.table import Table

    from megaconsa.checkpoint import store
    from megaconsa.errors import InputError

    paths = store.committed(run)
    if not paths:
        raise InputError(f"{run} holds no checkpoints; give a run folder")
    table = Table("checkpoint", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("tokens", "loss", "validation", "size", "written", "stall", "write"):
        table.add_column(name, justify="right")
    table.add_column("files")
    faults: list[str] = []
    for path in paths:
        try:
            saved = store.read(path)
        except InputError as error:
            table.add_row(path.name, *[""] * 7, "damaged")
            faults.append(str(error))
            continue
        written = saved.manifest["written"]
        if saved.bytes >= 2**28:
            size = f"{saved.bytes / 2**30:.2f} GiB"
        else:
            size = f"{saved.bytes / 2**20:.1f} MiB"
        missing = list(saved.faults(checksums=False).values())
        faults += missing
        table.add_row(
            path.name,
            f"{saved.state['tokens']:,}",
            _loss(saved.state.get("loss")),
            _loss(saved.state.get("validation_loss")),
            size,
            written["date"][:19],
            f"{written['stall_seconds']:.2f} s",
            f"{written['write_seconds']:.2f} s",
            "damaged" if missing else "whole",
        )
    # A fixed width keeps each row on one line for scripts, even if there is no terminal.
    console.print(table, width=200)
    for fault in faults:
        console.print(fault, markup=False)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    run_tool(main)
