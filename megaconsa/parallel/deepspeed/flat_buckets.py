"""How the flat tensors of DeepSpeed's BF16 optimizer are cut for communication.

A group of parameters lies in one flat tensor, in bf16 and again as fp32 gradients. Data rank i owns
the i-th of its equal partitions: it holds the master weights and moments of these elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch import distributed as dist

BUCKET_ELEMENTS = 32 * 2**20
"""Largest bucket: 128 MiB in fp32."""
SMALL_GROUP = 2**20
"""A group of parameters of at most so many elements is one bucket that no rank owns.

The norms of Qwen3-8B have 308,224. Of hundreds of data ranks, each would own some hundred bytes of
them, and there would be as many calls as ranks.
"""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring elements that one call communicates."""

    elements: slice
    """Of the group's flat tensor."""
    owner: int | None
    """Global rank of the data rank that owns the elements. None: several do."""
    weights: Sequence[Tensor]
    """Those that have elements here."""


def places(weights: Sequence[Tensor]) -> list[slice]:
    """Where each weight of a group lies in its flat tensor."""
    found = []
    end = 0
    for weight in weights:
        begin = end
        end += weight.numel()
        found.append(slice(begin, end))
    return found


def partition(optimizer: Any, number: int) -> slice:
    """The elements of a group's flat tensor that this data rank owns."""
    group = optimizer.real_dp_process_group[number]
    size = optimizer.bf16_groups_flat[number].numel() // dist.get_world_size(group)
    rank = dist.get_rank(group)
    return slice(rank * size, (rank + 1) * size)


def overlap(a: slice, b: slice) -> slice | None:
    """The elements in both, or None if there are none."""
    begin = max(a.start, b.start)
    end = min(a.stop, b.stop)
    return slice(begin, end) if begin < end else None


def relative_to(start: int, elements: slice) -> slice:
    """The place of elements of the flat tensor in a part of it that begins at `start`."""
    return slice(elements.start - start, elements.stop - start)


def buckets(optimizer: Any, number: int, apart: Sequence[Tensor] = ()) -> Iterator[Bucket]:
    """The buckets of a group of parameters, in the order of memory.

    optimizer: DeepSpeed's BF16_Optimizer.
    number: of the group.
    apart: weights that get buckets of their own.
    """
    weights = optimizer.bf16_groups[number]
    if not weights:
        return
    size = optimizer.bf16_groups_flat[number].numel()
    if size <= SMALL_GROUP:
        yield Bucket(slice(0, size), None, weights)
        return
    group = optimizer.real_dp_process_group[number]
    of_a_rank = size // dist.get_world_size(group)
    cuts = {*range(0, size, of_a_rank), size}
    ids_apart = {id(weight) for weight in apart}
    of_weights = places(weights)
    for weight, place in zip(weights, of_weights, strict=True):
        if id(weight) in ids_apart:
            cuts |= {place.start, place.stop}
    for first, last in pairwise(sorted(cuts)):
        for begin in range(first, last, BUCKET_ELEMENTS):
            elements = slice(begin, min(begin + BUCKET_ELEMENTS, last))
            inside = [
                weight
                for weight, place in zip(weights, of_weights, strict=True)
                if overlap(elements, place)
            ]
            if not inside:
                continue  # padding
            owner = dist.get_global_rank(group, begin // of_a_rank)
            yield Bucket(elements, owner, inside)
