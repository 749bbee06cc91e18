"""`megaconsa score-units`: makes an allocation from scores of single units, as a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megaconsa.console import check_out, console, run_tool
from megaconsa.errors import InputError
from megaconsa.study.score_options import OPTIONS

if TYPE_CHECKING:
    from megaconsa.evaluation.unit_scores import UnitScores

LISTED = 10
"""Number of units whose scores are printed."""


def main(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint or an import."),
    ],
    method: Annotated[
        Literal[
            "leave-one-out",
            "leave-one-in",
            "gradient",
            "attention-mass",
            "calibrate",
            "scalar-gates",
            "file",
        ],
        typer.Option(help="How units are scored; docs/baselines.md describes each."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="File to write the allocation to."),
    ],
    sparsity: Annotated[
        float,
        typer.Option(help="Share of the units that use the window."),
    ] = 0.75,
    scope: Annotated[
        Literal["per_layer", "global"],
        typer.Option(help="Whether every layer meets the sparsity, or all layers together."),
    ] = "global",
    granularity: Annotated[
        Literal["kv_head", "layer"],
        typer.Option(help="What a unit is."),
    ] = "kv_head",
    floor: Annotated[
        int,
        typer.Option(min=0, help="Full KV heads that every layer keeps, with --scope global."),
    ] = 0,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Keys that a windowed head sees. Default: the run's."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data folder; its training split is read. Default: the run's."),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that units are measured on. Default: 64."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in a pass. Default: the run's micro-batch, or 1."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed for the order of the training sequences. Default: 0."),
    ] = None,
    z: Annotated[
        float | None,
        typer.Option(help="Value of all gates; trained gates begin with it. Default: 0.5."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of gate training, with one batch each. Default: 100."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Adam's learning rate for trained gates. Default: 0.05."),
    ] = None,
    weight_learning_rate: Annotated[
        float | None,
        typer.Option(help="AdamW's learning rate, with scalar-gates. Default: the run's."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="JSON table or DuoAttention's TSV that the method file reads."),
    ] = None,
    save_scores: Annotated[
        Path | None,
        typer.Option(help="JSON file to write scores and standard errors to."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one."),
    ] = "auto",
) -> None:
    """Score each unit by itself and write the table in which the best ones are full.

    Example:

        megaconsa score-units runs/dense --method leave-one-out --sparsity 0.5 --out table.json
    """
    options: dict[str, Any] = {
        "data": data,
        "sequences": sequences,
        "batch": batch,
        "seed": seed,
        "z": z,
        "steps": steps,
        "learning_rate": learning_rate,
        "weight_learning_rate": weight_learning_rate,
        "scores": scores,
    }
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(method, given)
    check_out(out)
    if save_scores is not None:
        check_out(save_scores)

    import json

    from megaconsa.checkpoint import store
    from megaconsa.consa.allocation import Allocation
    from megaconsa.consa.constraint import Constraint
    from megaconsa.files import replace_text
    from megaconsa.reporting.terminal import text_map

    found = store.resolve(checkpoint)
    layers = found.model_config.num_hidden_layers
    kv_heads = found.model_config.num_key_value_heads
    # Made before the scores, so that a target that cannot be met does not cost their time.
    constraint = Constraint(layers, kv_heads, sparsity, granularity, scope, floor)
    # They import torch, so they come after what is most often refused.
    from megaconsa.evaluation.settings import find_device
    from megaconsa.evaluation.unit_scores import ScoreRequest, score_units

    request = ScoreRequest(method, find_device(device), granularity, window, **given)
    scored = score_units(found, request)
    table = Allocation.from_scores(scored.scores, constraint, scored.window, scored.origin)
    if save_scores is not None:
        replace_text(save_scores, json.dumps(scored.to_json(), indent=1) + "\n")
    table.save(out)
    margin = constraint.margin(scored.scores)
    console.print(text_map(table))
    console.print(f"largest scores: {_largest(scored)}", markup=False)
    console.print(
        f"{out}: sparsity {table.sparsity:.4f} (target {sparsity:g}), window {table.window}, "
        f"cut margin {margin:.3g}, scored by {method}",
        markup=False,
    )


def _check_options(method: str, given: dict[str, Any]) -> None:
    """Refuses options that the method would silently ignore, and rates that cannot train."""
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name not in OPTIONS[method]:
            raise InputError(f"{option} {value} has no effect on --method {method}; leave it out")
        # Written so that NaN is refused too.
        if name.endswith("learning_rate") and not 0 < value < float("inf"):
            raise InputError(f"{option} {value:g} must be a positive number")


def _largest(scored: UnitScores) -> str:
    """Describes the units with the largest scores, in order, with standard errors if known."""
    scores = scored.scores
    errors = scored.standard_errors
    order = scores.flatten().argsort(descending=True, stable=True)
    described = []
    for index in order[:LISTED].tolist():
        layer, unit = divmod(index, scores.shape[1])
        name = f"layer {layer}"
        if scored.granularity == "kv_head":
            name += f" head {unit}"
        value = f"{scores[layer, unit]:.3g}"
        if errors is not None:
            value += f" ± {errors[layer, unit]:.1g}"
        described.append(f"{name} ({value})")
    return ", ".join(described)


if __name__ == "__main__":
    run_tool(main)
