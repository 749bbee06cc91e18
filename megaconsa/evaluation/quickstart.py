"""The end of the quickstart: it tries out the export and shows a table of figures."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.evaluation.export_check import held_out_tokens, logit_difference
from megaconsa.huggingface.load import generate_line
from megaconsa.reporting.metrics import read_metrics

PROMPT = "def __init__(self"


def try_export(exported: Path, train: Path) -> tuple[float, str]:
    """Compares the export with the checkpoint of the run folder `train`, and generates a line.

    Returns the difference of the logits (`logit_difference`) and the line.
    """
    checkpoint = store.resolve(train)
    allocation = checkpoint.allocation
    assert allocation is not None
    weights = checkpoint.weights()
    tokens = held_out_tokens(checkpoint, 256)
    difference = logit_difference(exported, checkpoint.model_config, weights, allocation, tokens)
    continuation = generate_line(exported, PROMPT, 24).split("\n")[0]
    return difference, PROMPT + continuation


def summary(folder: Path, difference: float) -> Table:
    """Builds the final table. Each figure is read back from the files of the run."""
    learn = read_metrics(folder / "learn" / run_folder.METRICS)
    train = read_metrics(folder / "train" / run_folder.METRICS)
    gates = learn[-1]
    validation = [row["validation_loss"] for row in train if "validation_loss" in row]
    entropy = DatasetInfo.load(folder / "data").unigram_entropy
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "training loss, first and last step": (
            f"{learn[0]['loss']:.3f} -> {train[-1]['loss']:.3f} nats a token"
        ),
        "validation loss at the end": f"{validation[-1]:.3f}",
        "unigram entropy of the data": f"{entropy:.3f}",
        "sparsity: target / expected / binarised": (
            f"{gates['target_sparsity']:.3f} / {gates['expected_sparsity']:.3f} / "
            f"{gates['binarized_sparsity']:.3f}"
        ),
        "exported logits differ by": f"{difference:.1e} of the largest logit",
        "the report": str(folder / "report.html"),
        "the allocation": str(folder / run_folder.ALLOCATION),
        "the model, and how to load it": str(folder / "hf" / "README.md"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
