"""Finds the rank for which all others wait: a GPU that is too hot, a node with a slow disk."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import median_low

from megaconsa import incidents
from megaconsa.parallel.launcher import node
from megaconsa.parallel.mesh import Mesh
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

EVERY = 50
"""Steps between two comparisons, for which one small tensor is gathered."""
SLOW = 1.3
"""Times the median of its stage's ranks."""
SMALLEST_SECONDS = 0.01
"""By which a rank must be slower at least: below, it is the machine's noise."""


class SlowRanks(Callback):
    """Compares the ranks' own work a step, which is waiting for data and the forward and backward passes, within each pipeline stage:
    stages may differ. Every rank has one; the main one reports a rank when it becomes slow."""

    def __init__(self, run: Path, mesh: Mesh) -> None:
        """All ranks make one at the same time."""
        self.run, self.mesh = run, mesh
        self.hosts = mesh.world.exchange(node())
        self.steps = 0
        self.seconds = 0.0
        self.slow: set[int] = set()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.steps += 1
        if self.steps == 1:
            return  # it compiled
        self.seconds += trainer.work_seconds
        if row["step"] % EVERY and row["step"] != trainer.training.steps:
            return
        done, self.steps = self.steps - 1, 1
        seconds, memory = zip(
            *self.mesh.gather(self.seconds / done, row["memory_gib"]), strict=True
        )
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
        found = slow_ranks(seconds, self.mesh.world.size // self.mesh.pipeline_ranks)
        for rank in sorted(found - self.slow):
            text = (
                f"rank {rank} on {self.hosts[rank]} is slow: its own work took {seconds[rank]:.3g} s a step over the last {steps}, that of "
                f"its stage's median rank {median_of_stage(seconds, rank, self.mesh.world.size // self.mesh.pipeline_ranks):.3g} s"
            )
            logger.warning("%s", text)
            incidents.record(self.run, "slow_rank", text, step=step, rank=rank)
        self.slow = found


def slow_ranks(seconds: tuple[float, ...], stage_ranks: int) -> set[int]:
    """The ranks that are slow beside those of their stage. stage_ranks: ranks of one stage, which follow one another."""
    found = set()
    for rank, own in enumerate(seconds):
        usual = median_of_stage(seconds, rank, stage_ranks)
        if own > SLOW * usual and own - usual > SMALLEST_SECONDS:
            found.add(rank)
    return found


def median_of_stage(seconds: tuple[float, ...], rank: int, stage_ranks: int) -> float:
    """Of the ranks of one rank's stage; of two the faster one."""
    first = rank // stage_ranks * stage_ranks
    return median_low(seconds[first : first + stage_ranks])
