"""The interleaved 1F1B schedule (Narayanan et al. 2021, arXiv 2104.04473).

Each of P pipeline ranks holds two stages, called chunks: rank r holds stages r and P + r. A
micro-batch goes around the ranks twice. A pass then takes half as long as with one stage a rank, so
the pipeline fills and drains in half the time.

This is arithmetic. It needs no process group, so that a run can be planned before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNKS = 2
"""Stages of a rank."""


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of a micro-batch through a chunk."""

    is_forward: bool
    chunk: int
    micro_batch: int


def passes(pipeline: int, rank: int, micro_batches: int, forward_only: bool = False) -> list[Pass]:
    """The passes of a pipeline rank in their order.

    A rank runs its first chunk on `pipeline` micro-batches, then its second one on the same, and so
    on. It runs as many forward passes ahead as its first backward pass needs, and then alternates.
    """
    forward = []
    backward = []
    for first in range(0, micro_batches, pipeline):
        group = range(first, min(first + pipeline, micro_batches))
        for chunk in range(CHUNKS):
            forward += [Pass(True, chunk, micro_batch) for micro_batch in group]
            mirrored = CHUNKS - 1 - chunk
            backward += [Pass(False, mirrored, micro_batch) for micro_batch in group]
    if forward_only:
        return forward
    ahead = min(2 * (pipeline - rank - 1) + (CHUNKS - 1) * pipeline, len(forward))
    order = forward[:ahead]
    for number, later in enumerate(forward[ahead:]):
        order += [later, backward[number]]
    return order + backward[len(forward) - ahead :]


def in_flight(pipeline: int, rank: int, micro_batches: int) -> tuple[int, ...]:
    """For each chunk, the micro-batches whose activations are in memory at the rank's peak."""
    now = [0] * CHUNKS
    peak = tuple(now)
    for each in passes(pipeline, rank, micro_batches):
        now[each.chunk] += 1 if each.is_forward else -1
        if sum(now) > sum(peak):
            peak = tuple(now)
    return peak
