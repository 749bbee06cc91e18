"""`megaconsa bench-training`: compares a configuration's speed at several topologies.

Each topology, and each peer, is compared with one process on the same batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaconsa.console import check_out, console, run_tool

if TYPE_CHECKING:
    from megaconsa.benchmarks.training.layouts import Layout

RANK = "megaconsa.benchmarks.training.rank"
PEER_RANK = "megaconsa.benchmarks.training.peer_rank"


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Fields to change.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="Ranks on each axis, as tensor=2,context=2; may be repeated. "
            "Default: one process alone."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Another trainer: liger or torchtitan; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each.")] = 20,
    skip: Annotated[int, typer.Option(min=0, help="First steps that are not timed.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    r"""Train some steps at each topology, without saving anything, and compare tokens per
    second and losses with one process.

    Every topology gets the same global batches.
    The processes run on this machine, one for each GPU (or on the CPU).
    Peers train a dense model of the same shape on the same batches: `liger` is transformers
    with Liger's kernels.

    Example:

        megaconsa bench-training configs/qwen3_1p7b_learn.yaml \
            --topology tensor=2 --topology pipeline=2,data=2 \
            --peer liger --peer torchtitan
    """
    from datetime import UTC, datetime
    from json import dumps
    from tempfile import TemporaryDirectory

    from megaconsa import tables
    from megaconsa.benchmarks.short_run import run_alone, run_processes, schedule_fields
    from megaconsa.config import load
    from megaconsa.errors import InputError, RunError
    from megaconsa.files import replace_text
    from megaconsa.parallel.topology import Topology

    if skip >= steps:
        raise InputError(f"--skip {skip} must be less than --steps {steps}, or nothing is timed")
    if out is not None:
        check_out(out)
    load(config, overrides)
    # They import torch, so they come after what is most often refused.
    from megaconsa.benchmarks.training.layouts import Layout, measure, training_table
    from megaconsa.benchmarks.training.peers import TITLES, installed_version, obstacle

    layouts = [Layout(), *(Layout.parse(text) for text in topology or [])]
    fields = {
        layout: [
            *(overrides or []),
            *schedule_fields(steps),
            f"parallel.tensor={layout.tensor}",
            f"parallel.context={layout.context}",
            f"parallel.pipeline={layout.pipeline}",
        ]
        for layout in layouts
    }
    # Refuse every impossible topology and every missing peer before anything is measured.
    for layout in layouts:
        Topology.of(load(config, fields[layout]), layout.processes)
    versions = {name: installed_version(name) for name in peer or []}
    trainers: list[tuple[Layout, str | None]] = [(layout, None) for layout in layouts]
    not_measured = {}
    for name in versions:
        reason = obstacle(name, load(config, fields[layouts[0]]))
        if reason is None:
            trainers.append((layouts[0], name))
        else:
            not_measured[name] = reason
    first = None
    measurements = []
    with TemporaryDirectory() as folder:
        for number, (layout, trainer) in enumerate(trainers):
            title = str(layout) if trainer is None else TITLES[trainer]
            console.print(f"{title}: {steps} steps", markup=False)
            run = Path(folder) / str(number)
            result_file = Path(folder) / f"{number}.json"
            run_fields = [*fields[layout], f"run.dir={run}"]
            try:
                if trainer is None:
                    result = run_processes(RANK, config, result_file, run_fields, layout.processes)
                else:
                    result = run_alone(PEER_RANK, config, result_file, [trainer, *run_fields])
            except RunError as error:
                if trainer is None:
                    raise
                not_measured[trainer] = str(error)
            else:
                first = first or result
                measured = measure(layout, result, skip, first, trainer)
                measurements.append(measured)
                speed = f"{measured.tokens_per_second:,.0f} tokens/s"
                console.print(f"{title}: {speed}", markup=False)
            if out is not None:
                # Written after every trainer, so that a time limit does not lose the results.
                content = {
                    "config": str(config),
                    "overrides": overrides or [],
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "steps": steps,
                    "skip": skip,
                    "measurements": [measurement.to_dict() for measurement in measurements],
                    "peer_versions": versions,
                    "not_measured": not_measured,
                }
                replace_text(out, dumps(content, indent=1) + "\n")
    tables.show(training_table(measurements))
    for name, reason in not_measured.items():
        console.print(f"not measured: {TITLES[name]}: {reason}", markup=False)
    if out is not None:
        console.print(f"wrote {out}", markup=False)


if __name__ == "__main__":
    run_tool(main)
