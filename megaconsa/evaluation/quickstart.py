"""What the quickstart shows at its end: the export tried out, and a table of figures read back from what the run left."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.data.shards import DatasetInfo
from megaconsa.evaluation.export_check import held_out_tokens, logit_difference
from megaconsa.huggingface.load import generate_line
from megaconsa.reporting.metrics import read_metrics

PROMPT = "def __init__(self"


def try_export(exported: Path, train: Path) -> tuple[float, str]:
    """Difference of the export's logits from the checkpoint's, and a line the model writes."""

    checkpoint = store.resolve(train)
    allocation = checkpoint.allocation
    assert allocation is not None
    difference = logit_difference(
        exported,
        checkpoint.shape,
        checkpoint.weights(),
        allocation,
        held_out_tokens(checkpoint, 256),
    )
    return difference, PROMPT + generate_line(exported, PROMPT, 24).split("\n")[0]


def summary(folder: Path, difference: float) -> Table:
    """What a reader wants to know at the end, each figure read back from what the run left."""
    learn = read_metrics(folder / "learn" / run_folder.METRICS)
    train = read_metrics(folder / "train" / run_folder.METRICS)
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
        "the allocation": str(folder / run_folder.ALLOCATION),
        "the model, and how to load it": str(folder / "hf" / "README.md"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
