"""The pieces of the quickstart: running a command, trying the export, the closing table."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from megaconsa.checkpoint import store
from megaconsa.console import console
from megaconsa.data.shards import DatasetInfo
from megaconsa.reporting.metrics import read_metrics

PROMPT = "def __init__(self"


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def run(*arguments: object) -> None:
    """Runs a megaconsa command in a process of its own, as a user would; a failure ends the quickstart with the same exit code."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ megaconsa {shlex.join(words)}", style="dim", markup=False)
    process = subprocess.Popen([sys.executable, "-m", "megaconsa.cli", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # the command was interrupted with us, and saves before it ends
    if code == 2:
        console.print("the quickstart was refused; remove its folder to start clean, or name another with --folder", markup=False)
    elif code:
        console.print("the quickstart stopped; run it again to go on where it stopped", markup=False)
    if code:
        sys.exit(code)


def try_export(exported: Path, train: Path) -> tuple[float, str]:
    """Difference of the export's logits from the checkpoint's, and a line the model writes."""
    from megaconsa.evaluation.export_check import held_out_tokens, logit_difference
    from megaconsa.huggingface.load import generate_line

    checkpoint = store.resolve(train)
    allocation = checkpoint.allocation
    assert allocation is not None
    difference = logit_difference(exported, checkpoint, allocation, held_out_tokens(checkpoint, 256))
    return difference, PROMPT + generate_line(exported, PROMPT, 24).split("\n")[0]


def summary(folder: Path, difference: float) -> Table:
    """What a reader wants to know at the end, each figure read back from what the run left."""
    learn = read_metrics(folder / "learn" / "metrics.jsonl")
    train = read_metrics(folder / "train" / "metrics.jsonl")
    gates = learn[-1]
    validation = [row["validation_loss"] for row in train if "validation_loss" in row]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "training loss, first and last step": f"{learn[0]['loss']:.3f} -> {train[-1]['loss']:.3f} nats a token",
        "validation loss at the end": f"{validation[-1]:.3f}",
        "unigram entropy of the data": f"{DatasetInfo.load(folder / 'data').unigram_entropy:.3f}",
        "sparsity: target / expected / binarised": (
            f"{gates['target_sparsity']:.3f} / {gates['expected_sparsity']:.3f} / {gates['binarized_sparsity']:.3f}"
        ),
        "exported logits differ by": f"{difference:.1e} of the largest logit",
        "the report": str(folder / "report.html"),
        "the allocation": str(folder / "allocation.json"),
        "the model, and how to load it": str(folder / "hf" / "README.md"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
