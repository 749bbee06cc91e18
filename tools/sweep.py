"""`megaconsa sweep`: runs a study of allocations, from one YAML file to one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool


def main(
    study: Annotated[
        Path,
        typer.Argument(help="YAML of the study; configs/study.yaml is a commented one."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")],
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Jobs side by side. Default: one for each visible GPU, or one on a CPU.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX",
            help="Run one entry of --list, or `start`, as a task of a Slurm array does.",
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Print the study's trials with their indices, and run nothing.",
        ),
    ] = False,
) -> None:
    """Compare ways of choosing an allocation: arms x sparsities x seeds from one dense start,
    in one table and one page.

    The same command resumes an interrupted study.

    Examples:

        megaconsa sweep configs/study.yaml --out runs/study

        megaconsa sweep configs/study.yaml --out runs/study --only 12
    """
    from megaconsa.study import settings

    # It refuses what is no study. Heavy modules are imported after that.
    settings.load(study)
    from megaconsa.study import sweep

    runs = sweep.open_study(study, out)
    if show:
        sweep.list_trials(runs)
        return
    code = sweep.run_all(runs, jobs) if only is None else sweep.run_only(runs, only)
    sys.exit(code)


if __name__ == "__main__":
    run_tool(main)
