"""`megaconsa report`: shows a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool
from megaconsa.tables import CsvOption, JsonOption, MarkdownOption


def main(
    run: Annotated[
        Path, typer.Argument(help="A run folder, or a folder with run folders at any depth.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Run from which the losses of the others are subtracted, named as in the report; "
            "default: a dense one, or the first.",
        ),
    ] = None,
    smooth: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="STEPS", help="Steps of the moving average; default: 4 % of each run's."
        ),
    ] = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Write one self-contained HTML page: runs compared, masks, losses, speed, settings, origin.
    Print a line for each run.

    Examples:

        megaconsa report runs/quickstart --out quickstart.html

        megaconsa report runs --baseline dense/train --smooth 100
    """
    from megaconsa import tables
    from megaconsa.console import console, messages_on_stderr
    from megaconsa.errors import InputError

    form = tables.form_of(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown)
    # Drawing imports matplotlib, so a wrong path is refused before.
    if not run.is_dir():
        raise InputError(f"run {run} does not exist; give a run folder, or a folder of runs")
    from megaconsa.report.page import write_report
    from megaconsa.report.run_table import run_table
    from megaconsa.report.runs import find_runs

    found = find_runs(run)
    path = write_report(run, out, baseline, smooth, found)
    tables.show(run_table(found.runs), form)
    with messages_on_stderr(form != "text"):
        console.print(f"wrote {path}", markup=False)


if __name__ == "__main__":
    run_tool(main)
