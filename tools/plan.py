"""`megaconsa plan`: says what a run will cost before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool
from megaconsa.tables import CsvOption, JsonOption, MarkdownOption


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Fields to change.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run.")] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            "--device",
            help="Kind of GPU, for its bf16 peak and memory: h100, h200, a100-40gb, b200, ...",
        ),
    ] = "h100",
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Share of that peak that a GPU reaches, without bubble and imbalances. "
            "Default: assumed by topology and recomputation, from measurements."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the KV cache; default: the training length."),
    ] = None,
    topologies: Annotated[
        bool, typer.Option("--topologies", help="Compare all topologies of these GPUs instead.")
    ] = False,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="GPUS,GPUS,...",
            help="Simulate the fastest topology of each of these numbers of GPUs instead.",
        ),
    ] = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    r"""Reckon parameters, memory, FLOPs, KV cache, waiting and time of a run, without GPU or
    data, and whether it fits.

    A stage-2 configuration whose allocation does not exist yet is planned with the target of
    stage 1.

    Examples:

        megaconsa plan configs/qwen3_0p6b_learn.yaml parallel.pipeline=2 \
            --gpus 8 --context 131072

        megaconsa plan configs/qwen3_1p7b_train.yaml --gpus 8 --gpu a100 --topologies

        megaconsa plan configs/qwen3_1p7b_train.yaml training.global_batch=512 \
            --scale 64,256,1024
    """
    from json import dumps

    from megaconsa import tables
    from megaconsa.config import load
    from megaconsa.console import console
    from megaconsa.planning import changes
    from megaconsa.planning.plan import make_plan
    from megaconsa.planning.scaling import scale as scale_to
    from megaconsa.planning.table import plan_table, scaling_table, topology_table, verdict

    form = tables.form_of(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown)
    loaded = load(config, overrides)
    plan = make_plan(loaded, gpus, gpu, mfu, context)
    if scale is not None:
        tables.show(scaling_table(scale_to(loaded, plan, _counts(scale), mfu)), form)
        return
    if topologies:
        tables.show(topology_table(changes.topologies(loaded, plan, mfu)), form)
        return
    if form == "csv" or form == "markdown":
        tables.show(plan_table(plan), form)
        return
    change = None if plan.fits else changes.smallest_change(loaded, plan, mfu)
    if form == "json":
        fix = None if change is None else {"gpus": change.plan.gpus, "fields": change.fields}
        print(dumps({**plan.to_dict(), "smallest_change": fix}, indent=1))
        return
    tables.show(plan_table(plan))
    console.print()
    for line in verdict(plan, change):
        console.print(line, style="bold", markup=False)


def _counts(text: str) -> list[int]:
    """Reads numbers of GPUs."""
    from megaconsa.errors import InputError

    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise InputError(f"--scale {text} must be numbers of GPUs, such as 64,256,1024")
    return [int(word) for word in words]


if __name__ == "__main__":
    run_tool(main)
