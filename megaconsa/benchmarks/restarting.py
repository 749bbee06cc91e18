"""Measures what a restart reads of a checkpoint, rank by rank, in one process.

    python -m megaconsa.benchmarks.restarting runs/a/checkpoints/step_100 4 2 4

The numbers are tensor ranks, data ranks, and ranks of a node. A rank reads the fragments of weights
and moments that it would keep with ZeRO-1, without a pipeline. Before each node, the kernel forgets
the files. So it prints what a disk delivers, with what the kernel reads ahead and around.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.console import console, guarded
from megaconsa.files import binary_size
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.deepspeed.optimizer import MOMENTS
from megaconsa.parallel.gathered_weights import DistributedWeights
from megaconsa.parallel.sharding import Sharding

PREFIXES = ("", *(f"{moment}/" for moment in MOMENTS))


def load(checkpoint: Checkpoint, tensor: tuple[int, int], data: tuple[int, int]) -> int:
    """Reads what a rank keeps, and returns its bytes.

    tensor, data: the rank's place on each axis and the axis's size.
    """
    config = checkpoint.model_config
    shapes = weight_shapes(config)
    sharding = Sharding(config, checkpoint.allocation, *tensor)
    with torch.device("meta"):
        parts = {
            name: nn.Parameter(sharding.split(name, torch.empty(shape)))
            for name, shape in shapes.items()
        }
    mesh: Any = None
    weights = DistributedWeights(parts, shapes, {}, sharding, mesh, PREFIXES)
    kept = 0
    for prefix in PREFIXES:
        files = checkpoint.moments() if prefix else checkpoint.weights()
        for name, elements in _fragments(parts, *data):
            kept += weights.fragment(name, files.stored(prefix + name), elements).nbytes
    return kept


def _fragments(
    parts: dict[str, nn.Parameter], rank: int, ranks: int
) -> Iterator[tuple[str, range]]:
    """What ZeRO-1 keeps on a data rank: one of equal parts of all weights in a row."""
    total = sum(part.numel() for part in parts.values())
    first = total * rank // ranks
    last = total * (rank + 1) // ranks
    begin = 0
    for name, part in parts.items():
        elements = range(max(first - begin, 0), min(last - begin, part.numel()))
        if elements:
            yield name, elements
        begin += part.numel()


def _bytes_read() -> tuple[int, int]:
    """Bytes that this process has read by system calls, and bytes that disks delivered for it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = dict(line.split(": ") for line in lines)
    return int(values["rchar"]), int(values["read_bytes"])


def _forget(checkpoint: Checkpoint) -> None:
    for name in checkpoint.manifest["files"]:
        with (checkpoint.path / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    checkpoint = store.read(Path(sys.argv[1]))
    tensor, data, node = map(int, sys.argv[2:])
    ranks = [(dp, tp) for dp in range(data) for tp in range(tensor)]
    console.print(f"{'ranks':>9} {'keep':>12} {'read':>12} {'delivered':>12}  seconds")
    for first in range(0, len(ranks), node):
        _forget(checkpoint)
        called, delivered = _bytes_read()
        started = time.monotonic()
        kept = 0
        for dp, tp in ranks[first : first + node]:
            kept += load(checkpoint, (tp, tensor), (dp, data))
        seconds = time.monotonic() - started
        now = _bytes_read()
        sizes = [binary_size(each) for each in (kept, now[0] - called, now[1] - delivered)]
        columns = " ".join(f"{size:>12}" for size in sizes)
        last = min(first + node, len(ranks)) - 1
        console.print(f"{f'{first}-{last}':>9} {columns} {seconds:8.1f}")


if __name__ == "__main__":
    guarded(main)
