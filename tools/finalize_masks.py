"""`megaconsa finalize-masks`: from learned gates to a finished allocation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa.console import check_out, console, run_tool

FAR = 0.05
"""Distance of the expected sparsity from the target beyond which a table is questionable."""


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a learning run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="File to write; RUN/allocation.json if not given.")] = Path(),
    method: Annotated[
        Literal["top-k", "threshold"],
        typer.Option(help="top-k meets the target exactly in every constraint; threshold is the paper's log_alpha > 0."),
    ] = "top-k",
) -> None:
    """Binarise the learned gates of a run into allocation.json.

    Example:

        megaconsa finalize-masks runs/quickstart/learn --out runs/quickstart/allocation.json
    """
    from megaconsa.checkpoint import store
    from megaconsa.consa import hard_concrete
    from megaconsa.consa.allocation import Allocation, as_rows, cut_margin, threshold, top_k
    from megaconsa.errors import InputError
    from megaconsa.reporting.terminal import text_map

    checkpoint = store.resolve(run)
    gates = checkpoint.gates()
    if checkpoint.imported:
        raise InputError(f"{run} was imported and has learned no allocation; train with model.init_from={run} first")
    if gates is None:
        raise InputError(
            f"{run} did not learn an allocation: its configuration has allocation.source={_source(checkpoint.state)}"
        )
    if out == Path():
        out = checkpoint.path.resolve().parent.parent / "allocation.json"
    section, heads = checkpoint.state["config"]["allocation"], checkpoint.shape.num_key_value_heads
    granularity, scope, sparsity = section["granularity"], section["scope"], section["sparsity"]
    log_alpha = gates["log_alpha"] if granularity == "kv_head" else gates["log_alpha"][:, 0]
    full = top_k(log_alpha, sparsity, heads, granularity, scope) if method == "top-k" else threshold(log_alpha, heads)
    margin = cut_margin(log_alpha, sparsity, heads, granularity, scope)
    allocation = Allocation(
        window=checkpoint.state["config"]["attention"]["window"],
        full=as_rows(full),
        granularity=granularity,
        scope=scope,
        target_sparsity=sparsity,
        origin={
            "run": checkpoint.state["config"]["run"]["dir"],
            "step": checkpoint.step,
            "method": method,
            "cut_margin": None if math.isinf(margin) else margin,
        },
    )
    check_out(out)
    closed = 1 - hard_concrete.probability_nonzero(gates["log_alpha"])
    distance = float(((closed.mean(dim=1) if scope == "per_layer" else closed.mean()) - sparsity).abs().max())
    if distance > FAR:
        console.print(
            f"warning: at step {checkpoint.step} of {checkpoint.state['config']['training']['steps']} the gates' expected sparsity "
            f"is off its target {sparsity:g} by up to {distance:.3f}: learning had not arrived there",
            markup=False,
        )
    allocation.save(out)
    console.print(text_map(allocation))
    console.print(
        f"{out}: sparsity {allocation.sparsity:.4f} (target {sparsity:g}), window {allocation.window}, "
        f"cut margin {margin:.3f} in log_alpha",
        markup=False,
    )


def _source(state: dict[str, object]) -> object:
    config = state["config"]
    assert isinstance(config, dict)
    return config["allocation"]["source"]


if __name__ == "__main__":
    run_tool(main)
