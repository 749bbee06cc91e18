"""`megaconsa finalize-masks`: turns learned gates into a finished allocation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa import run_folder
from megaconsa.console import check_out, console, run_tool

FAR = 0.05
"""Distance of the expected sparsity from the target beyond which a table is questionable."""


def main(
    run: Annotated[
        Path, typer.Argument(help="Folder of a learning run, or one of its checkpoints.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN/allocation.json.")
    ] = None,
    method: Annotated[
        Literal["top-k", "threshold"],
        typer.Option(
            help="top-k meets the target exactly in every constraint; "
            "threshold is the paper's log_alpha > 0."
        ),
    ] = "top-k",
    require_evidence: Annotated[
        bool,
        typer.Option(
            "--require-evidence",
            help="Refuse an allocation that the run's evidence does not support.",
        ),
    ] = False,
) -> None:
    """Turn the learned gates of a run into allocation.json, and say what evidence supports it.

    Examples:

        megaconsa finalize-masks runs/quickstart/learn --out runs/quickstart/allocation.json

        megaconsa finalize-masks runs/a/learn --out allocation.json --require-evidence
    """
    from megaconsa.checkpoint import store
    from megaconsa.consa.allocation import Allocation
    from megaconsa.errors import InputError
    from megaconsa.reporting.terminal import text_map

    checkpoint = store.resolve(run)
    # Imports torch, so it comes after what is most often refused.
    from megaconsa.checkpoint.gates import read_gates

    bank = read_gates(checkpoint)
    constraint = bank.constraint
    sparsity = constraint.sparsity
    scores = bank.gates.scores
    if method == "threshold" and bank.settings.controller == "evidence":
        raise InputError(
            "--method threshold is for gates with log_alpha; "
            "gates.controller=evidence has none, use top-k"
        )
    table = constraint.top_k(scores) if method == "top-k" else scores.cpu() > 0
    evidence = bank.evidence.summary(table)
    # A sparsity of 0 or 1 has no cut that evidence could support.
    fault = evidence.fault(sparsity) if 0 < sparsity < 1 else None
    if fault and require_evidence:
        raise InputError(f"{run}: the cut is not supported by evidence: {fault}")
    margin = constraint.margin(scores)
    origin = {
        "run": checkpoint.origin["run"],
        "step": checkpoint.step,
        "tokens": checkpoint.state["tokens"],
        "controller": bank.settings.controller,
        "method": method,
        "cut_margin": None if math.isinf(margin) else margin,
        "split_agreement": evidence.split_agreement,
        "time_agreement": evidence.time_agreement,
        "separated_share": evidence.separated_share,
        "contradicted_share": evidence.contradicted_share,
    }
    allocation = Allocation.from_table(table, constraint, bank.settings.window, origin)
    if out is None:
        out = checkpoint.path.resolve().parent.parent / run_folder.ALLOCATION
    check_out(out)
    steps = bank.settings.steps
    distance = float((constraint.sparsities(bank.gates.open_probability) - sparsity).abs().max())
    if distance > FAR:
        console.print(
            f"warning: at step {checkpoint.step} of {steps} the gates' expected sparsity "
            f"is off its target {sparsity:g} by up to {distance:.3f}: "
            "learning had not arrived there",
            markup=False,
        )
    if fault:
        console.print(f"warning: the cut is not supported by evidence: {fault}", markup=False)
    allocation.save(out)
    console.print(text_map(allocation))
    console.print(
        f"{out}: sparsity {allocation.sparsity:.4f} (target {sparsity:g}), "
        f"window {allocation.window}, cut margin {margin:.3g}",
        markup=False,
    )
    console.print(
        f"evidence: split_agreement {_figure(evidence.split_agreement)}, "
        f"time_agreement {_figure(evidence.time_agreement)}, "
        f"separated_share {_figure(evidence.separated_share)}, "
        f"contradicted_share {_figure(evidence.contradicted_share)}",
        markup=False,
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_tool(main)
