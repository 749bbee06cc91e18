"""The sum of gradients over data ranks, while the backward pass still runs.

DeepSpeed's BF16 optimizer divides its fp32 gradients, and the master weights that they move, among
the data ranks. After the last backward pass it sums all gradients on every rank, through copies.
Here each bucket is summed on the rank that owns it, in place, as soon as the last micro-batch has
added to it. That is half the traffic, and it can overlap with the rest of the backward pass. ZeRO
(Rajbhandari et al. 2020, arXiv 1910.02054) and Megatron-LM's distributed optimizer do the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributed as dist

from megaconsa.parallel.deepspeed.flat_buckets import buckets


@dataclass(frozen=True)
class Sum:
    """Neighbouring gradients that are summed by one call."""

    gradients: Tensor
    """fp32, flat."""
    owner: int | None
    """Global rank that gets the sum. None: every rank does."""
    weights: Sequence[Tensor]
    """Those that have a part of their gradient here."""


class GradientReduction:
    """Averages the gradients of a BF16 optimizer over data ranks."""

    def __init__(self, optimizer: Any, tied: Collection[Tensor]) -> None:
        """optimizer: DeepSpeed's BF16_Optimizer.

        tied: weights whose gradients are summed over pipeline stages afterwards. Stages divide
            them differently among the data ranks, so every data rank gets their mean.
        """
        self._group = optimizer.real_dp_process_group[0]
        self._sums: list[Sum] = []
        # Backward passes reach the last weights first. The norms, which are the last group, are
        # complete only when the first block is.
        for group in range(len(optimizer.bf16_groups)):
            self._sums += reversed(list(_sums(optimizer, group, tied)))
        self._of_weight: dict[Tensor, list[int]] = {}
        for number, part in enumerate(self._sums):
            for weight in part.weights:
                self._of_weight.setdefault(weight, []).append(number)
        self._expected: Counter[Tensor] | None = None
        """How often a step adds to the gradient of each weight. The first step counts."""
        self.begin()

    def begin(self) -> None:
        """Starts a step."""
        self._added: Counter[Tensor] = Counter()
        self._missing = [len(part.weights) for part in self._sums]
        self._works: list[Any] = []

    def begin_pass(self) -> None:
        """Called before each backward pass. There is nothing to do."""

    def added(self, weight: Tensor) -> None:
        """Notes that a backward pass has added to the gradient of a weight.

        Raises RuntimeError if it got more gradients than in the first step.
        """
        self._added[weight] += 1
        if self._expected is None or self._added[weight] < self._expected[weight]:
            return
        if self._added[weight] > self._expected[weight]:
            raise RuntimeError(
                f"a weight of shape {tuple(weight.shape)} got more gradients than in the first "
                f"step, {self._expected[weight]}; they may have been summed before the last one"
            )
        for number in self._of_weight[weight]:
            self._missing[number] -= 1
        # In a fixed order, because every data rank must call its collectives in the same one.
        while len(self._works) < len(self._sums) and not self._missing[len(self._works)]:
            self._sum_next()

    def finish(self) -> None:
        """Ends the sums after the last backward pass. Gradients are then means over data ranks.

        Raises RuntimeError if weights got fewer gradients than in the first step.
        """
        if self._expected is None:
            self._expected = self._added
        elif self._expected != self._added:
            raise RuntimeError(
                f"a step added {self._added.total()} gradients to weights and the first one "
                f"{self._expected.total()}; every step must add as many to each weight"
            )
        while len(self._works) < len(self._sums):
            self._sum_next()
        for work in self._works:
            work.wait()
        rank = dist.get_rank()
        for part in self._sums:
            if part.owner in (None, rank):
                part.gradients.div_(dist.get_world_size(self._group))

    def settle(self) -> None:
        """Called when tied gradients are summed over stages. They are in place already."""

    def _sum_next(self) -> None:
        part = self._sums[len(self._works)]
        if part.owner is None:
            work: Any = dist.all_reduce(part.gradients, group=self._group, async_op=True)
        else:
            work = dist.reduce(part.gradients, part.owner, group=self._group, async_op=True)
        self._works.append(work)


def _sums(optimizer: Any, number: int, tied: Collection[Tensor]) -> Iterator[Sum]:
    """The sums of a group of parameters, in the order of memory."""
    flat = optimizer.fp32_groups_gradients_flat[number]
    ids_of_tied = {id(weight) for weight in tied}
    for bucket in buckets(optimizer, number, tuple(tied)):
        is_tied = any(id(weight) in ids_of_tied for weight in bucket.weights)
        owner = None if is_tied else bucket.owner
        yield Sum(flat[bucket.elements], owner, bucket.weights)
