"""`megaconsa checkpoints`: lists what a run has saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaconsa import run_folder
from megaconsa.console import console, run_tool
from megaconsa.tables import Cell, CsvOption, JsonOption, MarkdownOption, Row, Table

if TYPE_CHECKING:
    from megaconsa.checkpoint.store import Checkpoint

HEADINGS = (
    "checkpoint",
    "tokens",
    "loss",
    "validation",
    "size",
    "written",
    "stall",
    "write",
    "files",
)


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """List the checkpoints of a run, newest first: step, tokens, losses, size, date, seconds that
    training stood still and that writing took, and whether every file is there and of its size.

    It reads no tensors; `megaconsa verify` computes the checksums.

    Examples:

        megaconsa checkpoints runs/quickstart/train

        megaconsa checkpoints runs/quickstart/train --csv > checkpoints.csv
    """
    import sys

    from megaconsa import tables
    from megaconsa.checkpoint import store
    from megaconsa.errors import InputError

    form = tables.form_of(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown)
    paths = store.committed(run)
    is_young = not paths and (run / run_folder.CONFIG).is_file()
    if is_young and form == "text":
        console.print(f"{run}: no checkpoint yet; `megaconsa status` shows the run", markup=False)
        return
    if not paths and not is_young:
        raise InputError(f"{run} holds no checkpoints; give a run folder")
    table = Table(HEADINGS, left=(0, len(HEADINGS) - 1))
    faults: list[str] = []
    for path in paths:
        try:
            saved = store.read(path)
        except InputError as error:
            unread = len(HEADINGS) - 2
            table.rows.append(Row((path.name, *[""] * unread, "damaged")))
            faults.append(str(error))
            continue
        missing = list(saved.faults(checksums=False).values())
        faults += missing
        table.rows.append(_row(saved, "damaged" if missing else "whole"))
    tables.show(table, form)
    for fault in faults:
        # Other programs read the other forms from stdout.
        print(fault, file=sys.stdout if form == "text" else sys.stderr)


def _row(saved: Checkpoint, files: str) -> Row:
    from megaconsa.files import binary_size

    written = saved.manifest["written"]
    tokens = saved.state["tokens"]
    stall = written["stall_seconds"]
    write = written["write_seconds"]
    cells = (
        saved.path.name,
        Cell(f"{tokens:,}", tokens),
        _loss(saved.state.get("loss")),
        _loss(saved.state.get("validation_loss")),
        Cell(binary_size(saved.bytes), saved.bytes),
        Cell(written["date"][:19], written["date"]),
        Cell(f"{stall:.2f} s", stall),
        Cell(f"{write:.2f} s", write),
        files,
    )
    return Row(cells)


def _loss(loss: float | None) -> Cell:
    return Cell("-") if loss is None else Cell(f"{loss:.4f}", loss)


if __name__ == "__main__":
    run_tool(main)
