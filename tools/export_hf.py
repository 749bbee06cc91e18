"""`megaconsa export-hf`: exports a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa.console import console, run_tool


def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run folder (its newest checkpoint) or a checkpoint.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    allocation: Annotated[
        Path | None,
        typer.Option(
            help="allocation.json to export with; needed for a checkpoint of a learning run."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; that of the run's data if not given.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"] | None,
        typer.Option(
            help="Precision of the exported weights; bfloat16, or that of an import, if not given."
        ),
    ] = None,
    average: Annotated[
        int,
        typer.Option(
            min=1, help="Export the mean of the weights of this many newest checkpoints of the run."
        ),
    ] = 1,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file, such as 500MB.")
    ] = "5GB",
    verify: Annotated[
        int,
        typer.Option(
            min=0,
            help="Held-out tokens on which to compare the folder's logits "
            "with the checkpoint's, in fp32; 0 does not.",
        ),
    ] = 0,
) -> None:
    r"""Export a checkpoint for transformers: stock Qwen3 where layers are of one kind, else
    with its own small model file.

    Example:

        megaconsa export-hf runs/quickstart/train --out runs/quickstart/hf \
            --dtype float32 --verify 256

        megaconsa export-hf runs/quickstart/train --average 2 \
            --out runs/quickstart/hf_mean
    """
    import shutil
    from contextlib import ExitStack
    from functools import partial

    from megaconsa.checkpoint import store
    from megaconsa.consa.allocation import Allocation
    from megaconsa.consa.rules import dense
    from megaconsa.console import progress
    from megaconsa.data.tokenizer_folder import GENERATION_CONFIG
    from megaconsa.errors import InputError, RunError

    checkpoints = store.newest_of(source, average) if average > 1 else [store.resolve(source)]
    checkpoint = checkpoints[0]
    table = Allocation.load(allocation) if allocation else checkpoint.allocation
    if table is None and checkpoint.imported:
        model_config = checkpoint.model_config
        # An import without an allocation has full attention everywhere.
        table = dense(
            model_config.num_hidden_layers,
            model_config.num_key_value_heads,
            model_config.max_position_embeddings,
        )
    if table is None:
        raise InputError(
            f"{source} was still learning its allocation; "
            "run finalize-masks and give the file with --allocation"
        )
    if checkpoint.window not in (None, table.window):
        raise InputError(
            f"--allocation {allocation} has a window of {table.window}, "
            f"but {source} was trained with {checkpoint.window}"
        )
    if checkpoint.imported and verify:
        raise InputError(
            f"--verify {verify}: {source} was imported, "
            "so that it has no held-out tokens to compare on"
        )
    words = tokenizer or checkpoint.tokenizer
    if tokenizer is None and words is not None and not words.is_dir():
        raise InputError(
            f"the run's tokenizer {words} is not there any more; give its folder with --tokenizer"
        )
    # Imports of torch and transformers come after what is most often refused.
    import torch

    from megaconsa.evaluation.export_check import check_ids, held_out_tokens, logit_difference
    from megaconsa.huggingface.export import export, export_bytes
    from megaconsa.reporting.gate_plots import save_allocation
    from megaconsa.tensor_files import MeanTensors

    tokens = held_out_tokens(checkpoint, verify) if verify else None
    origin = checkpoint.origin | checkpoint.outcome
    if average > 1:
        origin["averaged_steps"] = [each.step for each in checkpoints]
    imported = checkpoint.imported or {}
    name = dtype or imported.get("dtype", "bfloat16")
    # An import without a tokenizer keeps the file beside its weights.
    kept = checkpoint.path / GENERATION_CONFIG
    generation_config = kept if imported and tokenizer is None and kept.is_file() else None
    precision = getattr(torch, name)
    with ExitStack() as reading:
        for each in checkpoints:
            reading.enter_context(each.in_use())
        all_weights = [each.weights() for each in checkpoints]
        weights = MeanTensors(all_weights) if average > 1 else all_weights[0]
        with progress(
            "exporting", export_bytes(checkpoint.model_config, precision), "bytes"
        ) as task:
            export(
                weights,
                checkpoint.model_config,
                table,
                out,
                tokenizer=words,
                dtype=precision,
                origin=origin,
                fingerprint=checkpoint.state["data"]["tokenizer_fingerprint"],
                token_ids=imported.get("token_ids") if tokenizer is None else None,
                generation_config=generation_config,
                max_shard_size=max_shard_size,
                heat_map=partial(save_allocation, table) if table.sparsity else None,
                advance=task.advance,
            )
        kind = "stock Qwen3" if table.is_layer_wise else "per-head model file"
        console.print(
            f"{out}: {kind}, {name}, sparsity {table.sparsity:.4f}, window {table.window}",
            markup=False,
        )
        if tokens is not None:
            try:
                difference = logit_difference(out, checkpoint.model_config, weights, table, tokens)
                ids = check_ids(out, words, tokens) if words else 0
            except RunError:
                # Nobody may load a wrong export.
                shutil.rmtree(out)
                raise
            console.print(
                f"{out}: logits differ from the checkpoint's by {difference:.1e} "
                f"of the largest logit, on {tokens.shape[1]} tokens",
                markup=False,
            )
            if words:
                console.print(
                    f"{out}: transformers gives a held-out text the {ids} ids that the run's "
                    "tokenizer gives it",
                    markup=False,
                )


if __name__ == "__main__":
    run_tool(main)
