"""`megaconsa profile`: shows where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import check_new_folder, console, run_tool


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Fields to change.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to trace.")] = 2,
    skip: Annotated[int, typer.Option(min=1, help="First steps that are not traced.")] = 3,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")
    ] = 1,
) -> None:
    r"""Train some steps, without saving a run, and show where their time goes: by kernel, by
    part of the step, and what the GPU waits for.

    The folder holds a trace and a memory snapshot of each rank, and all figures.

    Example:

        megaconsa profile configs/qwen3_0p6b_train.yaml --out profile
    """
    from datetime import UTC, datetime
    from json import dumps
    from tempfile import TemporaryDirectory

    from megaconsa.benchmarks.profile.analysis import analyse
    from megaconsa.benchmarks.profile.names import EXTRA_STEPS, FIGURES, TRACE, rank_folder
    from megaconsa.benchmarks.profile.tables import print_tables
    from megaconsa.benchmarks.profile.trace import read_trace
    from megaconsa.benchmarks.short_run import run_processes, schedule_fields
    from megaconsa.config import load
    from megaconsa.files import replace_text
    from megaconsa.parallel.topology import Topology

    check_new_folder(out)
    fields = [*(overrides or []), *schedule_fields(skip + steps + EXTRA_STEPS)]
    Topology.of(load(config, fields), processes)
    out.parent.mkdir(parents=True, exist_ok=True)
    # On the disk of `out`, so that a rename makes it whole.
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        result = Path(folder) / "result"
        measured = run_processes(
            "megaconsa.benchmarks.profile.rank",
            config,
            result / FIGURES,
            [str(steps), *fields, f"run.dir={Path(folder) / 'run'}"],
            processes,
        )
        ranks = [
            analyse(read_trace(result / rank_folder(rank) / TRACE)) for rank in range(processes)
        ]
        content = {
            "config": str(config),
            "overrides": overrides or [],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "skip": skip,
            **measured,
            "ranks": [rank.to_dict() for rank in ranks],
        }
        replace_text(result / FIGURES, dumps(content, indent=1) + "\n")
        result.rename(out)
    print_tables(ranks)
    unprofiled = measured["step_ms_without_profiler"]
    console.print(f"a step without the profiler: {unprofiled:,.2f} ms ({measured['device']})")
    console.print(f"wrote {out}", markup=False)


if __name__ == "__main__":
    run_tool(main)
