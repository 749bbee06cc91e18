"""`megaconsa show-batch`: shows what a step of a run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; it may be training.")],
    step: Annotated[
        int, typer.Argument(metavar="STEP", help="From 1, as in metrics.jsonl; it may be to come.")
    ],
    sequences: Annotated[
        int, typer.Option(min=1, help="How many sequences of the global batch to show.")
    ] = 8,
    data: Annotated[
        Path | None, typer.Option(help="The run's data, where they have moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show what a step of a run trains on: its sequences, their place in the data, and the
    beginning of each of their documents.

    It reads the run's configuration, metrics and data, takes no lock and writes nothing.

    Examples:

        megaconsa show-batch runs/quickstart/train 120

        megaconsa show-batch runs/a 45000 --sequences 2 --data /mnt/data/corpus --json
    """
    import json
    from dataclasses import asdict

    from rich.text import Text

    from megaconsa.training.early_checks import check_run_folder

    # Reading data imports torch, so a wrong path is refused before.
    check_run_folder(run)
    from megaconsa.training.step_batch import step_batch

    found = step_batch(run, step, data, sequences)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    last = found.first + found.global_batch - 1
    console.print(
        f"step {step} of {run}: sequences {found.first} to {last} of the data order, "
        f"from {found.data}",
        markup=False,
    )
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    for sequence in found.sequences:
        documents = len(sequence.documents)
        console.print(
            f"{sequence.place}: sequence {sequence.id}, row {sequence.row} of {sequence.file}, "
            f"{documents} document{'s' if documents != 1 else ''}",
            markup=False,
        )
        for document in sequence.documents:
            line = Text(f"{document.position:8}  {_one_line(document.text)}")
            line.truncate(console.width, overflow="ellipsis")
            console.print(line)
    if (more := found.global_batch - len(found.sequences)) > 0:
        console.print(f"and {more} more; --sequences {found.global_batch} shows all", markup=False)


def _one_line(text: str) -> str:
    """The text without line breaks, and without characters that would control the terminal."""
    shown = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


if __name__ == "__main__":
    run_tool(main)
