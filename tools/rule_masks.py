"""`megaconsa rule-masks`: writes an allocation that follows a rule, as a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa.console import check_out, console, run_tool

RULES_HELP = "dense, all-swa, interleaved, head-share, bottom-swa, middle or random."
SPARSITY_HELP = "Share of windowed heads; for head-share, bottom-swa, middle and random."
SEED_HELP = "Seed for random, which needs one. With a seed, head-share draws its heads too."
SCOPE_HELP = "Whether random meets the share in each layer or over all layers; layers need global."


def main(
    rule: Annotated[str, typer.Argument(help=RULES_HELP)],
    window: Annotated[
        int, typer.Option(min=1, help="Keys that a windowed head sees, including the query's own.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
    preset: Annotated[
        str | None, typer.Option(help="Model that gives the numbers of layers and KV heads.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Number of KV heads of a layer.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help=SPARSITY_HELP)] = 0.5,
    ratio: Annotated[
        int, typer.Option(help="Windowed layers for each full one; for interleaved.")
    ] = 3,
    granularity: Annotated[
        Literal["kv_head", "layer"], typer.Option(help="What random draws.")
    ] = "kv_head",
    scope: Annotated[Literal["per_layer", "global"], typer.Option(help=SCOPE_HELP)] = "global",
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help=SEED_HELP)] = None,
) -> None:
    r"""Write allocation.json by a rule and print it.

    head-share without a seed is a lottery: it keeps the first heads of each layer.
    The heads that matter may be any.

    Example:

        megaconsa rule-masks interleaved --preset qwen3-0.6b --window 1024 \
            --ratio 3 --out interleaved.json
    """
    from megaconsa.consa import rules
    from megaconsa.errors import InputError
    from megaconsa.model.config import PRESETS
    from megaconsa.reporting.terminal import text_map

    by_preset = preset is not None
    by_numbers = layers is not None or kv_heads is not None
    one_number = (layers is None) != (kv_heads is None)
    if by_preset == by_numbers or one_number:
        raise InputError("give either --preset or both --layers and --kv-heads")
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"--preset {preset} is unknown; choose one of {', '.join(PRESETS)}")
        layers = PRESETS[preset].num_hidden_layers
        kv_heads = PRESETS[preset].num_key_value_heads
    assert layers is not None
    assert kv_heads is not None
    allocation = rules.build(
        rule,
        layers,
        kv_heads,
        window,
        sparsity=sparsity,
        granularity=granularity,
        scope=scope,
        ratio=ratio,
        seed=seed,
    )
    check_out(out)
    allocation.save(out)
    console.print(text_map(allocation))
    console.print(
        f"{out}: {allocation.sparsity:.1%} of {layers} x {kv_heads} KV heads "
        f"use a window of {window}",
        markup=False,
    )


if __name__ == "__main__":
    run_tool(main)
