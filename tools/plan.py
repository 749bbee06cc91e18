"""`megaconsa plan`: says what a run will cost before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Fields to change.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run.")] = 1,
    device: Annotated[str, typer.Option(help="Kind of GPU, for its bf16 peak.")] = "h100",
    mfu: Annotated[
        float, typer.Option(help="Share of that peak a GPU is expected to reach while it has work.")
    ] = 0.4,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the KV cache; default: the training length."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with bytes and FLOPs unrounded.")
    ] = False,
) -> None:
    r"""Reckon parameters, memory, FLOPs, KV cache, waiting and time of a run, without GPU or
    data.

    Example:

        megaconsa plan configs/qwen3_0p6b_learn.yaml parallel.pipeline=2 \
            --gpus 8 --context 131072
    """
    from json import dumps

    from megaconsa.config import load
    from megaconsa.console import console
    from megaconsa.planning.plan import make_plan
    from megaconsa.planning.table import plan_table

    plan = make_plan(load(config, overrides), gpus, device, mfu, context)
    if json:
        print(dumps(plan.to_dict(), indent=1))
    else:
        console.print(plan_table(plan))


if __name__ == "__main__":
    run_tool(main)
