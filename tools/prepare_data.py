"""`megaconsa prepare-data`: turns text into a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaconsa.console import console, run_tool

if TYPE_CHECKING:
    from megaconsa.data.dataset_info import DatasetInfo


def main(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files of documents (text, JSON lines, Parquet, Arrow; compressed or not; "
            "Megatron-LM's .bin and .idx; index.json of MDS), folders of them, or `python`. "
            "Files and folders may be in an object store (s3://, gs://, azure://, hf://)",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DATA", help="The folder to make")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A Hugging Face tokenizer folder. Sources of ids need the one that they are from",
        ),
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
        str,
        typer.Option(
            metavar="NAME",
            help="Field or column that holds a document. In MDS, `tokens` or `input_ids` takes the "
            "place of the default where it is missing",
        ),
    ] = "text",
    prompt_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Field or column of the text before a document, which is not to be predicted",
        ),
    ] = None,
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
    packing: Annotated[
        str,
        typer.Option(
            metavar="cut|best-fit",
            help="Cut the joined documents into sequences, or keep documents whole that fit",
        ),
    ] = "cut",
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            metavar="SIMILARITY",
            help="Also look for documents this similar to an earlier one, such as 0.8",
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates",
            help="Leave out documents that repeat an earlier one of their source",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes. Default: one for each core")
    ] = None,
) -> None:
    r"""Tokenizes and packs text into a data folder for training.

    `python` means the sources of Python's standard library: real text that every machine has.
    The same command continues an interrupted preparation. A finished folder is never changed.

    Examples:

        megaconsa prepare-data python --out data/python \
            --train-tokenizer 4096 --sequence-length 512

        megaconsa prepare-data downloads/ --out data/web --field content \
            --tokenizer Qwen3-0.6B-Base/ --sequence-length 8192

        megaconsa prepare-data s3://bucket/web hf://datasets/owner/name/folder \
            --out data/mixed --tokenizer Qwen3-0.6B-Base/ --sequence-length 8192

        megaconsa prepare-data books/ --out data/books --separator '<|end|>' \
            --near-duplicates 0.8 --drop-duplicates --packing best-fit \
            --tokenizer Qwen3-0.6B-Base/ --sequence-length 8192

        megaconsa prepare-data chats.jsonl --out data/chats --prompt-field question \
            --field answer --packing best-fit \
            --tokenizer Qwen3-0.6B-Base/ --sequence-length 8192
    """
    from megaconsa.data.documents import Layout
    from megaconsa.data.preparation_options import Options, packing_named
    from megaconsa.data.prepare import prepare
    from megaconsa.data.tokenization import default_workers

    options = Options(
        sequence_length=sequence_length,
        validation_share=validation_share,
        layout=Layout(field, separator, prompt_field),
        skip_bad=skip_bad,
        packing=packing_named(packing),
        similarity=near_duplicates,
        drop_duplicates=drop_duplicates,
        workers=default_workers() if workers is None else workers,
    )
    info = prepare(sources, out, options, tokenizer=tokenizer, train_tokenizer=train_tokenizer)
    _print(info, out)


def _print(info: DatasetInfo, out: Path) -> None:
    """Prints what a data folder holds."""
    from megaconsa.tables import Row, Table, show

    headings = ("source", "documents", "repeated", "nearly", "tokens", "characters", "unknown")
    table = Table((*headings, "bytes"))
    for source in info.sources:
        near = source.near_duplicates
        # A source may hold nothing.
        tokens = max(1, source.tokens)
        cells = (
            source.name,
            f"{source.documents:,}",
            f"{source.exact_duplicates:,}",
            "" if near is None else f"{near:,}",
            f"{source.tokens:,}",
            f"{source.characters / tokens:.2f} a token" if source.characters else "",
            f"{source.unknown_tokens / tokens:.2%}",
            f"{source.byte_tokens / tokens:.2%}",
        )
        table.rows.append(Row(cells))
    show(table)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    table = Table(("split", "documents", "sequences", "tokens"))
    for name, split in info.splits.items():
        counts = (split.documents, split.sequences, split.tokens)
        table.rows.append(Row((name, *(f"{count:,}" for count in counts))))
    show(table)
    console.print(
        f"unigram entropy {info.unigram_entropy:.3f} nats, "
        f"vocabulary {info.vocab_size:,}, {size / 2**20:.1f} MiB in {out}",
        markup=False,
    )


if __name__ == "__main__":
    run_tool(main)
