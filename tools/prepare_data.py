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
            help="Files of documents (text, JSON lines, Parquet, Arrow; compressed or not), "
            "folders of them, or `python`",
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
    field: Annotated[
        str, typer.Option(metavar="NAME", help="Field or column that holds a document")
    ] = "text",
    separator: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text between the documents of a text file. Default: a file is one document",
        ),
    ] = None,
    skip_bad: Annotated[
        int, typer.Option(min=0, help="Documents that may be skipped because they are unreadable")
    ] = 0,
) -> None:
    r"""Tokenizes and packs text into a data folder for training.

    `python` means the sources of Python's standard library: real text that every machine has.
    A folder whose preparation was interrupted is started again; a finished one is never changed.

    Examples:

        megaconsa prepare-data python --out data/python \
            --train-tokenizer 4096 --sequence-length 512

        megaconsa prepare-data downloads/ --out data/web --field content \
            --tokenizer Qwen3-0.6B-Base/ --sequence-length 8192
    """
    from rich.table import Table

    from megaconsa.data.documents import Layout
    from megaconsa.data.prepare import prepare

    info = prepare(
        sources,
        out,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        sequence_length=sequence_length,
        validation_share=validation_share,
        layout=Layout(field, separator),
        skip_bad=skip_bad,
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
