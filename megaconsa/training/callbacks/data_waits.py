"""Warns when training waits for its data, and says what limits the reading."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median

from megaconsa import incidents
from megaconsa.data.read_cost import ReadCost
from megaconsa.data.stream import BatchStream
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

SHARE = 0.1
"""Data bound the training if waiting for them takes more than this share of the step time."""
SMALLEST_SECONDS = 0.01
"""Shortest wait per step that counts. Shorter ones are the machine's noise."""
WARM_UP_STEPS = 10
"""First steps after a start, which are not counted. They compile, and workers begin to read."""
LONGEST_PAUSE = 0.5
"""A step is not counted if the pause before it was longer than this share of the step.

Validation and checkpoints make such pauses. Meanwhile the workers read ahead."""
BLOCK_STEPS = 10
BLOCKS = 5
"""The share is the median over this many blocks of BLOCK_STEPS steps.

One long wait changes one block. Several workers that read one batch each deliver them together, so
there is one wait in several steps, and the median over single steps would miss it."""
REPEAT_STEPS = 1000
"""Steps between two warnings."""


@dataclass(frozen=True)
class Waits:
    """The waiting in some steps, as the main rank sees it."""

    steps: int = 0
    seconds: float = 0.0
    """Duration of the steps."""
    data_seconds: float = 0.0
    """The part until all ranks had their data."""
    own_seconds: float = 0.0
    """The part until this rank had its own."""
    cost: ReadCost = field(default_factory=ReadCost)
    """What this rank and its workers read meanwhile."""

    def __add__(self, other: Waits) -> Waits:
        return Waits(
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.data_seconds + other.data_seconds,
            self.own_seconds + other.own_seconds,
            self.cost + other.cost,
        )


class DataWaits(Callback):
    """Runs on the main rank only, whose `data_seconds` include the waits for other ranks' data.

    It must come before the work between steps, because it measures how long that work takes.
    """

    order = Order.WATCH
    main_rank_only = True

    def __init__(self, run: Path, stream: BatchStream) -> None:
        self.run = run
        self.stream = stream
        self.steps = 0
        """Steps since the start."""
        self.ended = 0.0
        """When the last step ended, by time.monotonic."""
        self.pause = 0.0
        """Seconds between the last step and the one before."""
        self.cost = ReadCost()
        """The stream's cost at the end of the last step."""
        self.block = Waits()
        self.blocks: deque[Waits] = deque(maxlen=BLOCKS)
        self.quiet_until = 0
        """No warning before this step."""

    def before_data(self, trainer: Trainer) -> None:
        self.pause = time.monotonic() - self.ended

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.ended = time.monotonic()
        cost = self.stream.cost - self.cost
        self.cost = self.stream.cost
        self.steps += 1
        if "step_seconds" not in row:
            # The step passed over its batch and did nothing else.
            return
        seconds = row["step_seconds"]
        if self.steps <= WARM_UP_STEPS or self.pause > LONGEST_PAUSE * seconds:
            return
        self.block += Waits(1, seconds, row["data_seconds"], trainer.own_data_seconds, cost)
        if self.block.steps < BLOCK_STEPS:
            return
        self.blocks.append(self.block)
        self.block = Waits()
        if row["step"] >= self.quiet_until and bound_by_data(self.blocks):
            self.quiet_until = row["step"] + REPEAT_STEPS
            self._report(row["step"])

    def _report(self, step: int) -> None:
        waits = reduce(add, self.blocks)
        text = (
            f"training waits for data in {waits.data_seconds / waits.seconds:.0%} of its time "
            f"({waits.data_seconds / waits.steps:.2g} of {waits.seconds / waits.steps:.2g} s a "
            f"step, over {waits.steps} steps): {cause(waits, self.stream)}"
        )
        logger.warning("%s", text)
        incidents.record(self.run, "slow_data", text, step=step, rank=0)


def bound_by_data(blocks: Sequence[Waits]) -> bool:
    """Whether training waits for data too long. False until there are enough blocks."""
    if len(blocks) < BLOCKS:
        return False
    share = median(block.data_seconds / block.seconds for block in blocks)
    per_step = median(block.data_seconds / block.steps for block in blocks)
    return share > SHARE and per_step > SMALLEST_SECONDS


def cause(waits: Waits, stream: BatchStream) -> str:
    """What limits the reading and how to change it, as far as the main rank knows."""
    if waits.own_seconds < waits.data_seconds / 2:
        return (
            f"rank 0 had its own after {waits.own_seconds / waits.steps:.2g} s, so other ranks "
            "read more slowly; slowest_rank in the metrics may name one"
        )
    cost = waits.cost
    workers = stream.workers
    speed = f"{cost.bytes / waits.seconds / 2**20:.3g} MiB/s"
    computing = cost.cpu_seconds / cost.seconds
    if workers == 0:
        return (
            f"with data.workers=0 rank 0 reads between its steps, {speed}, and computes in "
            f"{computing:.0%} of that time; set data.workers=2 to read ahead"
        )
    busy = cost.seconds / (waits.seconds * workers)
    if busy < 0.5:
        return (
            f"the workers of rank 0 (data.workers={workers}, {speed}) read in only {busy:.0%} of "
            "their time, so the limit is the trainer's own process, which makes batches of the "
            "rows; raise training.micro_batch, for fewer and larger batches"
        )
    if computing > 0.5:
        return (
            f"the workers of rank 0 (data.workers={workers}, {speed}) compute in {computing:.0%} "
            f"of their reading time, so the limit is the CPU; raise data.workers (rank 0 may use "
            f"{_cores()} cores)"
        )
    return (
        f"the workers of rank 0 (data.workers={workers}, {speed}) wait in {1 - computing:.0%} of "
        f"their reading time for the storage of {stream.path} or for a free core; raise "
        "data.workers to read more at once, or copy the data to faster storage"
    )


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
