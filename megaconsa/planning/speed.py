"""The MFU that a plan assumes if the user states none.

The figures were measured (docs/performance.md), except those of context ranks. They are rounded
down, and rough: `megaconsa bench-training` measures a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.topology import Topology

DENSE = 0.50
"""One H200, dense or a finished allocation, 8192 tokens: 0.6B 0.50 to 0.51, 1.7B 0.56."""
LEARNING = 0.46
"""The same at the start of learning: 0.6B 0.47, 1.7B 0.54."""
SINGLE_SEQUENCE = 0.91
"""Micro-batches of one sequence of 8192 tokens, relative to four. The host is too slow then."""
DATA = 0.95
"""Four H100, 1.7B, micro-batch 1: tokens/s over four times those of one."""
PIPELINE = 0.93
"""Four pipeline ranks reached 0.78 there, and their bubble alone allows 0.84."""
TENSOR = {2: 0.45, 4: 0.32}
"""Four tensor ranks reached 0.32 there. Two with two pipeline ranks reached 0.40. More ranks count
as four."""
CONTEXT = 0.85
"""A guess: context ranks have not been measured."""
HEADS_RECOMPUTED = 0.007
"""q and k of all layers: 6 ms of a step of 843."""
SHORT_TOKENS = 16_384
"""Tokens of a micro-batch below which a single sequence counts as short."""


@dataclass(frozen=True)
class AssumedSpeed:
    """The share of the peak that a GPU reaches, without bubbles and imbalances, and why."""

    mfu: float
    reasons: list[str]


def assumed_speed(
    topology: Topology,
    recomputed: Recomputation,
    num_layers: int,
    micro_batch: int,
    length: int,
    *,
    learning: bool,
) -> AssumedSpeed:
    """Returns the MFU of a topology. FLOPs that are computed again do not count as work.

    num_layers: layers of the model. length: tokens of a sequence.
    """
    mfu = LEARNING if learning else DENSE
    reasons = [f"{mfu:.2f} on one GPU{' while learning' if learning else ''}"]

    def slower(factor: float, reason: str) -> None:
        nonlocal mfu
        mfu *= factor
        reasons.append(f"x {factor:.2f} {reason}")

    if micro_batch == 1 and length // topology.context < SHORT_TOKENS:
        slower(SINGLE_SEQUENCE, "micro-batch 1")
    # A layer's forward pass is a third of its work.
    again = len(recomputed.whole) / num_layers / 3
    again += len(recomputed.heads) / num_layers * HEADS_RECOMPUTED
    if again:
        slower(1 / (1 + again), "recomputation")
    if topology.data * topology.context > 1:
        slower(DATA, "sums of gradients")
    if topology.context > 1:
        slower(CONTEXT, "context ranks (not measured, a guess)")
    if topology.tensor > 1:
        slower(TENSOR[2] if topology.tensor == 2 else TENSOR[4], "tensor ranks")
    if topology.pipeline > 1:
        slower(PIPELINE, "pipeline ranks beyond the bubble")
    return AssumedSpeed(mfu, reasons)
