"""Gradients are averaged over data ranks in buckets, while the backward pass still runs."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from megaconsa.parallel.deepspeed import flat_buckets
from megaconsa.parallel.deepspeed.gradient_reduction import GradientReduction
from megaconsa.parallel.deepspeed.own_gradients import OwnGradients
from megaconsa.parallel.world import join
from tests.support.forked_ranks import run_forked

RANKS = 2
GROUPS = ((7, 20, 3, 11, 9), (2, 4))
"""Numbers of elements of each weight: the matrices, and the norms."""
MICRO_BATCHES = 3
TIED = 1


def optimizer(rank: int) -> SimpleNamespace:
    """What the reduction reads of DeepSpeed's optimizer, with padding at the end of a group."""
    groups = [[torch.zeros(size) for size in sizes] for sizes in GROUPS]
    flats = []
    for sizes in GROUPS:
        padded = -(-(sum(sizes) + 1) // RANKS) * RANKS
        flats.append(torch.zeros(padded))
    sizes_of_parts = [len(flat) // RANKS for flat in flats]
    return SimpleNamespace(
        bf16_groups=groups,
        bf16_groups_flat=[flat.bfloat16() for flat in flats],
        fp32_groups_gradients=[
            [gradient for _, gradient in pairs_of(weights, flat)]
            for weights, flat in zip(groups, flats, strict=True)
        ],
        fp32_groups_gradients_flat=flats,
        fp32_groups_gradient_flat_partition=[
            flat[rank * size : (rank + 1) * size]
            for flat, size in zip(flats, sizes_of_parts, strict=True)
        ],
        real_dp_process_group=[dist.group.WORLD] * len(GROUPS),
    )


def pairs_of(weights: list[Tensor], flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each weight of a group and its part of the flat gradients."""
    ends = list(accumulate(weight.numel() for weight in weights))
    return [
        (weight, flat[end - weight.numel() : end])
        for weight, end in zip(weights, ends, strict=True)
    ]


def gradients_of(parts: SimpleNamespace) -> list[tuple[Tensor, Tensor]]:
    """Each weight and its gradient."""
    found = []
    for weights, gradients in zip(parts.bf16_groups, parts.fp32_groups_gradients, strict=True):
        found += list(zip(weights, gradients, strict=True))
    return found


def drawn(rank: int, step: int, number: int, micro_batch: int, size: int) -> Tensor:
    seed = ((rank * 10 + step) * 10 + number) * 10 + micro_batch
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def check() -> None:
    """One rank of a test."""
    join()
    with (
        patch.object(flat_buckets, "BUCKET_ELEMENTS", 6),
        patch.object(flat_buckets, "SMALL_GROUP", 10),
    ):
        reduce(dist.get_rank())


def reduce(rank: int) -> None:
    parts = optimizer(rank)
    pairs = gradients_of(parts)
    tied_weight, tied_gradient = pairs[TIED]
    reduction = GradientReduction(parts, [tied_weight])
    sums = len(reduction._sums)
    assert sums > 8
    for step in range(3):
        for flat in parts.fp32_groups_gradients_flat:
            flat.zero_()
        reduction.begin()
        begun = []
        for micro_batch in range(MICRO_BATCHES):
            # The order of a backward pass: the last matrix first, norms here and there.
            for number in (4, 6, 3, 2, 1, 5, 0):
                weight, gradient = pairs[number]
                gradient += drawn(rank, step, number, micro_batch, len(gradient))
                reduction.added(weight)
                begun.append(len(reduction._works))
        # The first step counts. Later ones begin each sum as soon as it is complete.
        if step == 0:
            assert begun[-1] == 0
        else:
            before_last = (MICRO_BATCHES - 1) * len(pairs)
            assert begun[before_last - 1] == 0
            assert 0 < begun[before_last] < begun[-2] < begun[-1] == sums
        reduction.finish()
        means = []
        for number, (_, gradient) in enumerate(pairs):
            drawn_by_all = [
                drawn(other, step, number, micro_batch, len(gradient))
                for other in range(RANKS)
                for micro_batch in range(MICRO_BATCHES)
            ]
            means.append(torch.stack(drawn_by_all).sum(dim=0) / RANKS)
        check_means(rank, parts, means)
        torch.testing.assert_close(tied_gradient, means[TIED])
        # All but one weight, as if another rank counted it.
        norm = OwnGradients(parts).norm([gradient for _, gradient in pairs[1:]])
        torch.testing.assert_close(norm, torch.cat(means[1:]).norm()[None])
    reduction.begin()
    for number in (4, 6, 3, 2, 1, 5, 0):
        reduction.added(pairs[number][0])
    with pytest.raises(RuntimeError, match=r"added 7 gradients to weights and the first one 21"):
        reduction.finish()
    reduction.begin()
    for _ in range(MICRO_BATCHES):
        reduction.added(tied_weight)
    with pytest.raises(RuntimeError, match=r"shape \(20,\) got more gradients than in the first"):
        reduction.added(tied_weight)


def check_means(rank: int, parts: SimpleNamespace, means: list[Tensor]) -> None:
    """Checks the partition of this rank, which is what AdamW reads."""
    first = 0
    for sizes, flat, own in zip(
        GROUPS,
        parts.fp32_groups_gradients_flat,
        parts.fp32_groups_gradient_flat_partition,
        strict=True,
    ):
        whole = torch.zeros(len(flat))
        whole[: sum(sizes)] = torch.cat(means[first : first + len(sizes)])
        first += len(sizes)
        torch.testing.assert_close(own, whole[rank * len(own) : (rank + 1) * len(own)])


def test_each_rank_gets_the_means_of_its_partition() -> None:
    run_forked(RANKS, check)
