"""`megaconsa generate`: continues texts with a run, a checkpoint or an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import run_tool


def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
            help="A run folder (its newest checkpoint), a checkpoint, an import or an export.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A file with one text to continue; - or no prompt reads from stdin."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest continuation, in tokens; 128 or what fits if not given."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most probable token; higher draws.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the most probable tokens that together have this share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; the model's own if not given.")
    ] = None,
) -> None:
    r"""Continue texts with a model, without exporting it. The text goes to stdout as it grows.

    A run that still learns uses the allocation that its gates give now.

    Example:

        megaconsa generate runs/quickstart/train --prompt "def main("

        megaconsa generate runs/quickstart/hf --file start.py \
            --temperature 0.8 --top-p 0.95 --seed 1
    """
    import sys

    from megaconsa.errors import InputError

    if prompt and file:
        raise InputError("--prompt and --file are both given; keep one of them")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p:g} must lie above 0 and not above 1")
    if top_p < 1 and temperature == 0:
        raise InputError(
            f"--top-p {top_p:g} has no effect on the most probable token; "
            "add --temperature, for example 0.8"
        )
    if not source.exists():
        raise InputError(f"{source} does not exist; give a run, a checkpoint or an export")
    prompts = prompt or [_read(file)]
    if "" in prompts:
        raise InputError("the prompt is empty; give at least one character to continue")

    import torch

    from megaconsa.evaluation.continuation import Sampling, continue_text, encode, room
    from megaconsa.evaluation.text_model import open_text_model

    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    dtype = torch.bfloat16 if is_gpu else torch.float32
    text_model = open_text_model(source, tokenizer, device, dtype)
    encoded = encode(text_model, prompts)
    new_tokens = room(text_model, encoded, max_new_tokens)
    # Not on stdout, which holds the text alone.
    print(text_model.description, file=sys.stderr)
    sampling = Sampling(temperature, top_p, seed)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    for number, inputs in enumerate(encoded):
        if number:
            write("\n")
        continue_text(text_model, inputs, new_tokens, sampling, write)
        write("\n")


def _read(file: Path | None) -> str:
    """The text of a file or of stdin, without the newline that ends its last line."""
    import sys

    from megaconsa.errors import InputError

    try:
        if file is not None and str(file) != "-":
            text = file.read_text(encoding="utf-8")
        elif file is None and sys.stdin.isatty():
            raise InputError("there is no text to continue; give --prompt TEXT or --file FILE")
        else:
            text = sys.stdin.read()
    except OSError as error:
        raise InputError(f"--file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--file {file or '-'} is not UTF-8 text: {error.reason}") from None
    return text.removesuffix("\n")


if __name__ == "__main__":
    run_tool(main)
