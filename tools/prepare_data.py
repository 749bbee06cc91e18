"""`megaconsa prepare-data`: turns text into a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, .jsonl files (field `text`), folders of them, or `python`",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DATA", help="The folder to make")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A Hugging Face tokenizer folder")
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            metavar="VOCAB", help="Train a BPE of this many tokens on the sources instead"
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence")] = 512,
    validation_share: Annotated[
        float, typer.Option(help="Share of the documents that is held out for validation")
    ] = 0.02,
) -> None:
    r"""Tokenizes and packs text into a data folder for training.

    `python` means the sources of Python's standard library: real text that every machine has.
    A folder whose preparation was interrupted is started again; a finished one is never changed.

    Example:

        megaconsa prepare-data python --out data/python \
            --train-tokenizer 4096 --sequence-length 512
    """
    from rich.table import Table

    from megaconsa.data.prepare import prepare

    info = prepare(
        sources,
        out,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        sequence_length=sequence_length,
        validation_share=validation_share,
    )
    tokens = sum(split.tokens for split in info.splits.values())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    table = Table("split", "documents", "sequences", "tokens", box=None)
    for name, split in info.splits.items():
        table.add_row(name, f"{split.documents:,}", f"{split.sequences:,}", f"{split.tokens:,}")
    console.print(table)
    console.print(
        f"{info.source.characters / tokens:.2f} characters a token, "
        f"unigram entropy {info.unigram_entropy:.3f} nats, "
        f"vocabulary {info.vocab_size:,}, {size / 2**20:.1f} MiB in {out}",
        markup=False,
    )


if __name__ == "__main__":
    run_tool(main)
