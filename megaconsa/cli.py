"""The command `megaconsa`: training, and one subcommand per tool in tools/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import guarded
from megaconsa.tools import (
    bench_attention,
    bench_training,
    checkpoints,
    evaluate_models,
    export_hf,
    fetch_checkpoint,
    finalize_masks,
    generate,
    import_hf,
    plan,
    prepare_data,
    profile_training,
    quickstart,
    report,
    rule_masks,
    score_units,
    show_batch,
    status,
    submit,
    sweep,
    verify,
    verify_data,
)

app = typer.Typer(
    name="megaconsa",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain Qwen3-like models that learn which KV heads keep full attention (ConSA).",
)


def _show_version(wanted: bool) -> None:
    """Prints the version and ends the command."""
    if wanted:
        from megaconsa.version import described

        print(f"megaconsa {described()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version, and the commit of a checkout.",
        ),
    ] = False,
) -> None:
    """Takes the options that stand before the command."""


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration; configs/ has commented ones.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.field=value, as many as needed.")
    ] = None,
) -> None:
    """Learn masks or train on a finished allocation; the same command resumes.

    Examples:

        megaconsa train configs/tiny_gpu.yaml

        megaconsa train configs/qwen3_0p6b_learn.yaml run.dir=runs/a allocation.sparsity=0.75

        torchrun --nproc_per_node 8 -m megaconsa.train configs/qwen3_0p6b_learn.yaml
    """
    # Heavy modules are imported late, so that --help is quick.
    from megaconsa.train import train as run

    sys.exit(run(config, overrides or []))


for name, tool in {
    "prepare-data": prepare_data,
    "verify-data": verify_data,
    "finalize-masks": finalize_masks,
    "rule-masks": rule_masks,
    "score-units": score_units,
    "import-hf": import_hf,
    "export-hf": export_hf,
    # As a script, a file named evaluate.py would hide the package of that name from lm-eval.
    "evaluate": evaluate_models,
    "generate": generate,
    "checkpoints": checkpoints,
    "fetch-checkpoint": fetch_checkpoint,
    "status": status,
    "show-batch": show_batch,
    "verify": verify,
    "plan": plan,
    "report": report,
    "submit": submit,
    "sweep": sweep,
    "bench-attention": bench_attention,
    "bench-training": bench_training,
    # As a script, a file named profile.py would hide the module of that name from the standard
    # library's cProfile.
    "profile": profile_training,
    "quickstart": quickstart,
}.items():
    app.command(name)(tool.main)


def main() -> None:
    guarded(app)


if __name__ == "__main__":
    main()
