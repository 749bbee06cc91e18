"""`megaconsa status`: shows the status of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; it may be training.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show the state of a run: progress, speed, losses, newest checkpoint, time to go, incidents.

    It also shows whether a process trains in the run. It only reads, as little as it can, and takes
    no lock.

    Example: watch -n 10 megaconsa status runs/quickstart/learn
    """
    import json
    from dataclasses import asdict

    from megaconsa.reporting.status import status
    from megaconsa.reporting.status_lines import status_lines

    found = status(run)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    for line in status_lines(found):
        console.print(line, markup=False)


if __name__ == "__main__":
    run_tool(main)
