"""`megaconsa submit`: submits training jobs to Slurm after checking them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa.console import console, run_tool


def main(
    job: Annotated[
        Literal["learn", "train", "evaluate", "chain", "sweep"],
        typer.Argument(help="The job: a file of that name in slurm/."),
    ],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [FIELD=VALUE]...",
            help="A configuration (chain: one of each stage) and fields to change. "
            "evaluate: its arguments, behind --.",
        ),
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a training job.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, help="GPUs of each, with a process on each.")
    ] = 8,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Cores of each process.")] = 8,
    exclusive: Annotated[
        bool | None,
        typer.Option(
            help="Share a training job's nodes with nobody. Default: where it takes 8 GPUs of each."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Time limit of one start, such as 24:00:00. Default: that of the file in slurm/."
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="--OPTION=VALUE", help="Another option for sbatch, may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of chain and sweep: folder of their runs."),
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Of sweep: a target sparsity, may be repeated.")
    ] = None,
    granularity: Annotated[
        list[str] | None,
        typer.Option(help="Of sweep: kv_head or layer, may be repeated. Default: kv_head."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands; submit nothing.")
    ] = False,
) -> None:
    r"""Submit jobs that requeue themselves until their run is finished. All is checked before
    anything is submitted.

    Examples:

        megaconsa submit train configs/qwen3_0p6b_train.yaml --nodes 2 \
            --time 24:00:00 --partition gpu

        megaconsa submit chain configs/qwen3_0p6b_learn.yaml \
            configs/qwen3_0p6b_train.yaml --out runs/qwen3_0p6b --dry-run

        megaconsa submit sweep configs/qwen3_0p6b_learn.yaml --out runs/sweep \
            --sparsity 0.25 --sparsity 0.5
    """
    from megaconsa.cluster import jobs
    from megaconsa.errors import InputError

    resources = jobs.Resources(
        nodes,
        gpus_per_node,
        time,
        partition,
        account,
        tuple(sbatch or ()),
        cpus_per_task,
        exclusive,
    )
    # Number of configurations that come before the fields.
    wanted = {"chain": 2, "evaluate": 0}.get(job, 1)
    configs = [Path(word) for word in arguments[:wanted]]
    overrides = arguments[wanted:]
    if len(configs) < wanted or any("=" in config.name for config in configs):
        plural = "s" if wanted > 1 else ""
        raise InputError(
            f"{job} needs {wanted} configuration{plural} before its fields; see --help"
        )
    configs = [jobs.expanded(config, "configuration") for config in configs]
    out = out and jobs.expanded(out, "--out")
    if (job in ("chain", "sweep")) != (out is not None):
        fault = "is missing" if out is None else "belongs to chain and sweep"
        raise InputError(f"--out FOLDER {fault}: it holds the runs of several jobs")
    if (job == "sweep") != bool(sparsity) or (granularity and job != "sweep"):
        raise InputError(
            "--sparsity, at least once, and --granularity belong to sweep, and to no other job"
        )
    if job == "evaluate":
        submission = jobs.evaluation(overrides, resources)
    elif job == "chain":
        assert out is not None
        submission = jobs.chain(configs[0], configs[1], out, overrides, resources)
    elif job == "sweep":
        assert out is not None
        submission = jobs.sweep(
            configs[0], out, sparsity or [], granularity or ["kv_head"], overrides, resources
        )
    else:
        submission = jobs.training(job, configs[0], overrides, resources)
    if dry_run:
        print(submission.rehearse())
        return
    jobs.check_slurm()
    said = submission.run()
    console.print(said if job == "chain" else f"{job}: job {said.partition(';')[0]}", markup=False)
    console.print(
        f"logs: {submission.logs}/    queue: squeue --me    stop for good: scancel JOB",
        markup=False,
    )


if __name__ == "__main__":
    run_tool(main)
