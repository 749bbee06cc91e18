"""`megaconsa evaluate`: compares exported models by perplexity, needles and tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from megaconsa.console import console, messages_on_stderr, run_tool
from megaconsa.tables import CsvOption, JsonOption, MarkdownOption


def main(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[LABEL=]FOLDER",
            help="A folder that export-hf made; repeat it. The others are compared with the first.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Data folder, of which the held-out documents are used.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for evaluation.json and evaluation.png; "
            "what it holds is not measured again."
        ),
    ],
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Positions of a document to predict from. Default: the data's sequence length.",
        ),
    ] = None,
    documents: Annotated[
        int, typer.Option(min=0, help="Held-out documents, the longest; 0 leaves perplexity out.")
    ] = 256,
    needle_length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of a haystack; repeat it. "
            "Default: 1/8, 1/4, 1/2 and all of the data's sequence length.",
        ),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Place of the needle, 0 at the beginning; repeat it. "
            "Default: 0, 0.25, 0.5, 0.75 and 1.",
        ),
    ] = None,
    needles: Annotated[
        int, typer.Option(min=0, help="Needles of each length and depth; 0 leaves them out.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of needles and haystacks.")] = 0,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-eval; repeat it. Needs the extra `harness`."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' YAML files. Default: lm-eval's own.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"] | None,
        typer.Option(help="Default: bfloat16; without a GPU float32."),
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a forward pass, if a sequence is not longer itself."),
    ] = 16_384,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    r"""Compare exported models: perplexity by position in the document, needle retrieval, tasks
    of lm-eval.

    Each figure is written as soon as it is there; the same command continues where it was stopped.

    Example:

        megaconsa evaluate --model dense=runs/dense/hf \
            --model learned=runs/learned/hf --data data/corpus_8192 --out evaluation
    """
    # Set before transformers is imported, which reads them. To let lm-eval download its data, set
    # HF_HUB_OFFLINE=0.
    offline = os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", offline)

    from megaconsa import tables
    from megaconsa.data.mixture_file import read_info
    from megaconsa.errors import InputError
    from megaconsa.evaluation.named_models import named_models

    form = tables.form_of(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown)
    if task_folder is not None and not task:
        raise InputError(f"--task-folder {task_folder} without --task NAME; name the tasks to run")
    # What is most often refused comes before the imports of torch and transformers.
    read_info(data)
    named_models(model)
    from megaconsa.evaluation.evaluate import evaluate
    from megaconsa.evaluation.picture import FILE, save_picture
    from megaconsa.evaluation.settings import Request, find_device
    from megaconsa.evaluation.table import evaluation_table, footer

    place = find_device(device)
    with messages_on_stderr(form != "text"):
        evaluation = evaluate(
            Request(
                models=model,
                data=data,
                out=out,
                length=length,
                documents=documents,
                needle_lengths=needle_length or [],
                depths=depth or [0, 0.25, 0.5, 0.75, 1],
                needles=needles,
                seed=seed,
                tasks=task or [],
                task_folder=task_folder,
                device=place,
                dtype=dtype or ("bfloat16" if place.type == "cuda" else "float32"),
                batch_tokens=batch_tokens,
            )
        )
    picture = out / FILE
    save_picture(evaluation, picture)
    tables.show(evaluation_table(evaluation), form)
    if form != "text":
        return
    for line in footer(evaluation):
        console.print(line, markup=False)
    console.print(f"wrote {picture} and evaluation.json beside it", markup=False)


if __name__ == "__main__":
    run_tool(main)
