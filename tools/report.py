"""`megaconsa report`: shows a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool


def main(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder that holds run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: masks, sparsity, losses, speed and settings.

    Example: megaconsa report runs/quickstart --out quickstart.html
    """
    from megaconsa.console import console
    from megaconsa.errors import InputError

    # Drawing imports matplotlib, so a wrong path is refused before.
    if not run.is_dir():
        raise InputError(f"run {run} does not exist; give a run folder, or a folder of runs")
    from megaconsa.reporting.report import write_report

    console.print(f"wrote {write_report(run, out)}", markup=False)


if __name__ == "__main__":
    run_tool(main)
