"""`megaconsa bench-training`: compares a configuration's speed at several topologies.

Each topology is compared with one process on the same batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import check_out, console, run_tool


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Fields to change.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="Ranks on each axis, as tensor=2,pipeline=2; may be repeated. "
            "Default: one process alone."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each.")] = 20,
    skip: Annotated[int, typer.Option(min=0, help="First steps that are not timed.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    r"""Train some steps at each topology, without saving anything, and compare tokens per
    second and losses with one process.

    Every topology gets the same global batches.
    The processes run on this machine, one for each GPU (or on the CPU).

    Example:

        megaconsa bench-training configs/qwen3_1p7b_learn.yaml \
            --topology tensor=2 --topology pipeline=2 --topology data=2
    """
    from datetime import UTC, datetime
    from json import dumps
    from tempfile import TemporaryDirectory

    from megaconsa.benchmarks.short_run import run_processes, schedule_fields
    from megaconsa.benchmarks.training.layouts import Layout, measure, training_table
    from megaconsa.config import load
    from megaconsa.errors import InputError
    from megaconsa.files import replace_text
    from megaconsa.parallel.topology import Topology

    if skip >= steps:
        raise InputError(f"--skip {skip} must be less than --steps {steps}, or nothing is timed")
    if out is not None:
        check_out(out)
    layouts = [Layout(), *(Layout.parse(text) for text in topology or [])]
    fields = {
        layout: [
            *(overrides or []),
            *schedule_fields(steps),
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
        ]
        for layout in layouts
    }
    # Refuse every impossible topology before the first one is measured.
    for layout in layouts:
        Topology.of(load(config, fields[layout]), layout.processes)
    results = {}
    measurements = []
    with TemporaryDirectory() as folder:
        for number, layout in enumerate(layouts):
            console.print(f"{layout}: {steps} steps", markup=False)
            run = Path(folder) / str(number)
            result_file = Path(folder) / f"{number}.json"
            run_fields = [*fields[layout], f"run.dir={run}"]
            results[layout] = run_processes(
                "megaconsa.benchmarks.training.rank",
                config,
                result_file,
                run_fields,
                layout.processes,
            )
            measured = measure(layout, results[layout], skip, results[layouts[0]])
            measurements.append(measured)
            console.print(f"{layout}: {measured.tokens_per_second:,.0f} tokens/s", markup=False)
            if out is not None:
                # Written after every topology, so that a time limit does not lose the results.
                content = {
                    "config": str(config),
                    "overrides": overrides or [],
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "steps": steps,
                    "skip": skip,
                    "measurements": [measurement.to_dict() for measurement in measurements],
                }
                replace_text(out, dumps(content, indent=1) + "\n")
    console.print(training_table(measurements))
    if out is not None:
        console.print(f"wrote {out}", markup=False)


if __name__ == "__main__":
    run_tool(main)
