"""Gradients that are divided over data ranks, as in ZeRO-2.

Each rank keeps the fp32 gradients of the blocks' matrices only where it also keeps the master
weights. A backward pass writes the gradients of a block into a buffer. When the block is complete,
the parts of the buffer are summed on the ranks that own them, while the backward pass goes on with
the block before it. There are two buffers, which the blocks use in turn. Every micro-batch is
summed, so the traffic grows with their number.

Gradients of the embedding, the head and the norms stay whole on every rank, and are summed once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megaconsa.parallel.deepspeed import flat_buckets
from megaconsa.parallel.deepspeed.compute_clock import Pause
from megaconsa.parallel.deepspeed.flat_buckets import overlap, partition, places, relative_to


@dataclass(eq=False)
class Block:
    """The gradients of a block's matrices, which are neighbours in a flat tensor."""

    buffer: Tensor
    """fp32, flat. Two blocks later another one uses it."""
    matrices: int
    """How many."""
    parts: list[tuple[Tensor, int]]
    """The parts of the buffer with the global rank that owns each."""
    own: list[tuple[Tensor, Tensor]]
    """A part of the buffer, and the gradients of this rank to which its sum is added."""


class ShardedGradients:
    """Averages the gradients of a BF16 optimizer over data ranks, each on its owner."""

    def __init__(
        self,
        optimizer: Any,
        blocks: Sequence[Collection[Tensor]],
        tied: Collection[Tensor],
        pause: Pause,
    ) -> None:
        """Replaces the optimizer's gradients, and frees their memory.

        optimizer: DeepSpeed's BF16_Optimizer, before its first step.
        blocks: the matrices of each block.
        tied: weights whose gradients are summed over pipeline stages afterwards.
        pause: makes a context for waits during a backward pass.
        """
        self._pause = pause
        self._optimizer = optimizer
        self._group = optimizer.real_dp_process_group[0]
        self._blocks: list[Block] = []
        self._block_of: dict[Tensor, Block] = {}
        self._whole: list[tuple[Tensor, int | None]] = []
        """Gradients that are summed once, with the global rank that owns each, or None."""
        self._own_of_whole: list[tuple[Tensor, Tensor]] = []
        """A part of a whole gradient, and the gradients of this rank that it belongs to."""
        largest = max((sum(map(Tensor.numel, block)) for block in blocks), default=0)
        device = optimizer.bf16_groups_flat[0].device
        self._buffers = [torch.zeros(largest, device=device) for _ in range(2)]
        block_of = {id(weight): number for number, block in enumerate(blocks) for weight in block}
        ids_of_tied = {id(weight) for weight in tied}
        for number in range(len(optimizer.bf16_groups)):
            self._replace(number, block_of, ids_of_tied)
        optimizer.clear_hp_grads = self._clear
        self.begin()

    def begin(self) -> None:
        """Starts a step."""
        self._gradients_of: dict[int, int] = {}
        """How many gradients an incomplete block of the backward pass has got, by its id."""
        self._works: list[tuple[Block, Any]] = []

    def begin_pass(self) -> None:
        """Called before each backward pass."""
        # Its first block may use the buffer of the last block of the pass before.
        self._drain()

    def added(self, weight: Tensor) -> None:
        """Notes that a backward pass has added to the gradient of a weight."""
        block = self._block_of.get(weight)
        if block is None:
            return
        self._gradients_of[id(block)] = self._gradients_of.get(id(block), 0) + 1
        if self._gradients_of[id(block)] == block.matrices:
            del self._gradients_of[id(block)]
            # The next block of this backward pass writes into the buffer that this waits for.
            self._drain()
            self._sum(block)

    def finish(self) -> None:
        """Ends the sums after the last backward pass. Gradients are then means over data ranks.

        Raises RuntimeError if a block got a part of its gradients only.
        """
        if self._gradients_of:
            raise RuntimeError(
                "a block got gradients of some of its matrices only; with parallel.shard=gradients "
                "a backward pass must reach all of them"
            )
        self._drain()
        works: list[Any] = []
        for gradient, owner in self._whole:
            if owner is None:
                works.append(dist.all_reduce(gradient, group=self._group, async_op=True))
            else:
                works.append(dist.reduce(gradient, owner, group=self._group, async_op=True))
        for work in works:
            work.wait()
        ranks = dist.get_world_size(self._group)
        for gradient, _ in self._whole:
            gradient.div_(ranks)
        for block in self._blocks:
            for _, own in block.own:
                own.div_(ranks)

    def settle(self) -> None:
        """Takes over the whole gradients, after tied ones were summed over stages."""
        for gradient, own in self._own_of_whole:
            own.copy_(gradient)

    def _replace(
        self, number: int, block_of: Mapping[int, int], ids_of_tied: Collection[int]
    ) -> None:
        """Replaces the gradients of a group of parameters.

        block_of: the number of a matrix's block, by its id.
        """
        optimizer = self._optimizer
        weights = optimizer.bf16_groups[number]
        own = partition(optimizer, number)
        flat = torch.zeros(own.stop - own.start, device=self._buffers[0].device)
        gradients: list[Tensor] = []
        together = groupby(
            zip(weights, places(weights), strict=True), lambda pair: block_of.get(id(pair[0]))
        )
        for block_number, pairs in together:
            members, of_members = zip(*pairs, strict=True)
            elements = slice(of_members[0].start, of_members[-1].stop)
            size = elements.stop - elements.start
            if block_number is None:
                buffer = torch.zeros(size, device=flat.device)
            else:
                buffer = self._buffers[block_number % 2][:size]
            gradients += [buffer[relative_to(elements.start, place)] for place in of_members]
            parts = self._parts(number, buffer, elements)
            held = []
            common = overlap(own, elements)
            if common is not None:
                held.append(
                    (
                        buffer[relative_to(elements.start, common)],
                        flat[relative_to(own.start, common)],
                    )
                )
            if block_number is not None:
                block = Block(buffer, len(members), parts, held)
                self._blocks.append(block)
                self._block_of |= dict.fromkeys(members, block)
                continue
            self._own_of_whole += held
            is_tied = any(id(weight) in ids_of_tied for weight in members)
            if is_tied or size <= flat_buckets.SMALL_GROUP:
                self._whole.append((buffer, None))
            else:
                self._whole += parts
        # DeepSpeed has this list under two names.
        optimizer.fp32_groups_gradients[number][:] = gradients
        for flats in (
            optimizer.fp32_groups_gradients_flat,
            optimizer.fp32_groups_actual_gradients_flat,
            optimizer.fp32_groups_gradient_flat_partition,
            optimizer.non_expert_gradients,
        ):
            flats[number] = flat

    def _parts(self, number: int, buffer: Tensor, elements: slice) -> list[tuple[Tensor, int]]:
        """The parts of a buffer by the data ranks that own them.

        elements: what the buffer holds of the flat tensor of a group of parameters.
        """
        ranks = dist.get_world_size(self._group)
        size = self._optimizer.bf16_groups_flat[number].numel() // ranks
        parts = []
        for rank in range(ranks):
            common = overlap(slice(rank * size, (rank + 1) * size), elements)
            if common is not None:
                owner = dist.get_global_rank(self._group, rank)
                parts.append((buffer[relative_to(elements.start, common)], owner))
        return parts

    def _sum(self, block: Block) -> None:
        for part, owner in block.parts:
            work = dist.reduce(part, owner, group=self._group, async_op=True)
            self._works.append((block, work))

    def _drain(self) -> None:
        """Ends the sums that are under way, and clears their buffers."""
        if not self._works:
            return
        with self._pause():
            for _, work in self._works:
                work.wait()
        blocks = dict.fromkeys(block for block, _ in self._works)
        self._works = []
        for block in blocks:
            for part, own in block.own:
                own += part
            block.buffer.zero_()

    def _clear(self) -> None:
        """Sets all gradients to 0."""
        for own in self._optimizer.fp32_groups_gradient_flat_partition:
            own.zero_()
        for gradient, _ in self._whole:
            gradient.zero_()
