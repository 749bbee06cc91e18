"""`megaconsa quickstart`: all steps on one machine, by the commands that a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megaconsa import run_folder
from megaconsa.console import console, run_tool


def main(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Text in, a learned allocation, a Hugging Face model out: a few minutes on two CPU cores.

    An interrupted quickstart continues where it stopped when it is run again.

    Example: megaconsa quickstart
    """
    import shutil
    import time

    from megaconsa import configs
    from megaconsa.evaluation.quickstart import summary, try_export

    started = time.monotonic()
    yaml = Path(configs.__file__).parent
    data = folder / "data"
    learn = folder / "learn"
    train = folder / "train"
    allocation = folder / run_folder.ALLOCATION
    exported = folder / "hf"

    _say("Collect Python's own sources, train a tokenizer on them, pack them into shards")
    _run(
        "prepare-data", "python", "--out", data, "--train-tokenizer", 4096, "--sequence-length", 512
    )
    _say("Stage 1: learn which KV heads keep full attention, together with the weights")
    _run("train", yaml / "quickstart.yaml", f"run.dir={learn}", f"data.path={data}")
    _say("Binarise the gates: half of the KV heads keep full attention")
    _run("finalize-masks", learn, "--out", allocation)
    _say("Stage 2: train on with that allocation")
    _run(
        "train",
        yaml / "quickstart_train.yaml",
        f"run.dir={train}",
        f"data.path={data}",
        f"model.init_from={learn}",
        f"allocation.file={allocation}",
    )
    _say("Hand the model over in Hugging Face format")
    # An earlier quickstart may have made this folder, and export-hf never overwrites.
    shutil.rmtree(exported, ignore_errors=True)
    _run("export-hf", train, "--out", exported, "--dtype", "float32")
    _say("Load it with transformers, compare its logits with the checkpoint's, let it write a line")
    difference, line = try_export(exported, train)
    console.print(line, markup=False)
    _say("Write the report")
    _run("report", folder)
    console.print(summary(folder, difference))
    console.print(f"\n{time.monotonic() - started:.0f} s in all", markup=False)


def _say(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _run(*arguments: object) -> None:
    """Runs a megaconsa command in a separate process, as a user would.

    If it fails, the quickstart exits with the same code.
    """
    words = [str(argument) for argument in arguments]
    console.print(f"$ megaconsa {shlex.join(words)}", style="dim", markup=False)
    process = subprocess.Popen([sys.executable, "-m", "megaconsa.cli", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reached the command too. It saves before it ends.
        code = process.wait()
    if code == 2:
        console.print(
            "the quickstart was refused; "
            "remove its folder to start clean, or name another with --folder",
            markup=False,
        )
    elif code:
        console.print(
            "the quickstart stopped; run it again to continue where it stopped", markup=False
        )
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_tool(main)
