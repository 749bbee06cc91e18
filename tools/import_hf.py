"""`megaconsa import-hf`: imports a Hugging Face Qwen3 folder as a checkpoint to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with config.json and safetensors of a dense Qwen3, "
            "or an export of export-hf."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to make.")],
) -> None:
    r"""Import published Qwen3 weights; runs start from the result with model.init_from, in any
    topology.

    Weights keep their precision.
    The tokenizer comes along, for prepare-data --tokenizer OUT/tokenizer.

    Example:

        megaconsa import-hf Qwen3-0.6B/ --out runs/qwen3_0p6b/import

        megaconsa train configs/qwen3_0p6b_learn.yaml \
            model.init_from=runs/qwen3_0p6b/import
    """
    from megaconsa.console import progress
    from megaconsa.data import TOKENIZER
    from megaconsa.errors import InputError
    from megaconsa.files import check_new_folder, check_space

    check_new_folder(out)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a model folder: it does not exist")
    # They import torch and transformers, so they come after what is most often refused.
    from megaconsa.checkpoint import imported
    from megaconsa.data.tokenizer import Tokenizer
    from megaconsa.huggingface.source import add_generation_config, open_source

    source = open_source(folder)
    tokenizer = Tokenizer.load(folder) if source.has_tokenizer else None
    if tokenizer and tokenizer.vocab_size > source.model_config.vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has a token {tokenizer.vocab_size - 1}, "
            f"but vocab_size={source.model_config.vocab_size} in config.json"
        )
    check_space(out, source.bytes)

    def add_files(made: Path) -> None:
        if tokenizer:
            tokenizer.copy(made / TOKENIZER)
        add_generation_config(source, made / TOKENIZER if tokenizer else made)

    with progress("importing", source.bytes, "bytes") as task:
        imported.write(
            out,
            source.model_config,
            source.dtype,
            source.shapes,
            source.read,
            allocation=source.allocation,
            fingerprint=tokenizer.fingerprint if tokenizer else None,
            origin={
                "folder": str(folder),
                "model_type": source.model_type,
                "token_ids": source.token_ids,
            },
            add_files=add_files,
            advance=task.advance,
        )
    parameters = source.bytes // source.dtype.itemsize
    dtype = str(source.dtype).removeprefix("torch.")
    without = "" if tokenizer else ", without a tokenizer"
    console.print(f"{out}: {parameters:,} parameters in {dtype}{without}", markup=False)


if __name__ == "__main__":
    run_tool(main)
