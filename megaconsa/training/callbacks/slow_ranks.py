"""Finds a rank that all other ranks wait for.

Its GPU may be too hot, for example, or its node may have a slow disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import median_low

from megaconsa import incidents
from megaconsa.parallel.launcher import node
from megaconsa.parallel.mesh import Mesh
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

EVERY = 50
"""Steps between two comparisons. Each comparison is an all-gather of one small tensor."""
SLOW = 1.3
"""A rank is slow if it takes this multiple of the median time of its stage's ranks."""
SMALLEST_SECONDS = 0.01
"""Smallest difference to the median that counts, per step. Smaller ones are the machine's noise."""


class SlowRanks(Callback):
    """Compares the ranks' own work per step within each pipeline stage, because stages may differ.

    A rank's own work is waiting for data, and the forward and backward passes. Every rank has this
    callback. The main rank reports a rank when it becomes slow.
    """

    order = Order.MEASURE

    def __init__(self, run: Path, mesh: Mesh) -> None:
        """All ranks must make one at the same time."""
        self.run = run
        self.mesh = mesh
        self.stage_ranks = mesh.world.size // mesh.pp_size
        self.hosts = mesh.world.exchange(node())
        self.steps = 0
        self.seconds = 0.0
        self.slow: set[int] = set()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.steps += 1
        if self.steps == 1:
            return  # The first step compiles.
        self.seconds += trainer.work_seconds
        if row["step"] % EVERY and row["step"] != trainer.training.steps:
            return
        done = self.steps - 1
        self.steps = 1
        gathered = self.mesh.all_gather(self.seconds / done, row["memory_gib"])
        seconds, memory = zip(*gathered, strict=True)
        self.seconds = 0.0
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        row |= {
            "rank_seconds": median_low(seconds),
            "slowest_rank": slowest,
            "slowest_rank_seconds": seconds[slowest],
            "largest_memory_gib": max(memory),
        }
        if self.mesh.is_main:
            self._report(seconds, row["step"], done)

    def _report(self, seconds: tuple[float, ...], step: int, steps: int) -> None:
        """Logs the ranks that have become slow.

        seconds: each rank's own work per step.
        steps: number of steps that `seconds` is the mean of.
        """
        found = slow_ranks(seconds, self.stage_ranks)
        for rank in sorted(found - self.slow):
            usual = median_of_stage(seconds, rank, self.stage_ranks)
            text = (
                f"rank {rank} on {self.hosts[rank]} is slow: its own work took "
                f"{seconds[rank]:.3g} s a step over the last {steps}, that of "
                f"its stage's median rank {usual:.3g} s"
            )
            logger.warning("%s", text)
            incidents.record(self.run, "slow_rank", text, step=step, rank=rank)
        self.slow = found


def slow_ranks(seconds: tuple[float, ...], stage_ranks: int) -> set[int]:
    """The ranks that are slow compared with the other ranks of their stage.

    seconds: each rank's own work per step.
    stage_ranks: ranks per stage. The ranks of a stage are consecutive.
    """
    found = set()
    for rank, own in enumerate(seconds):
        usual = median_of_stage(seconds, rank, stage_ranks)
        if own > SLOW * usual and own - usual > SMALLEST_SECONDS:
            found.add(rank)
    return found


def median_of_stage(seconds: tuple[float, ...], rank: int, stage_ranks: int) -> float:
    """Median time in the stage of `rank`. For an even number of ranks, the lower middle value."""
    first = rank // stage_ranks * stage_ranks
    return median_low(seconds[first : first + stage_ranks])
