"""The gradients that a data rank owns: those of the master weights that it updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megaconsa.parallel.deepspeed.flat_buckets import overlap, partition, places, relative_to
from megaconsa.parallel.deepspeed.flat_views import joined


class OwnGradients:
    """The partition of a BF16 optimizer's gradients that this data rank has the means of."""

    def __init__(self, optimizer: Any) -> None:
        """optimizer: DeepSpeed's BF16_Optimizer."""
        self.partitions: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
        """What AdamW reads, of each group of parameters."""
        self._group = optimizer.real_dp_process_group[0]
        self._own: dict[int, Tensor] = {}
        """The part of a weight's gradient that is in a partition, by the id of the gradient."""
        for number, gradients in enumerate(optimizer.fp32_groups_gradients):
            own = partition(optimizer, number)
            weights = optimizer.bf16_groups[number]
            for gradient, place in zip(gradients, places(weights), strict=True):
                part = overlap(own, place)
                if part is not None:
                    here = relative_to(own.start, part)
                    self._own[id(gradient)] = self.partitions[number][here]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of gradients over all data ranks.

        gradients: some of the optimizer's `fp32_groups_gradients`, the same on every data rank.

        Returns fp32 (1,), the same on every data rank.
        """
        own = [self._own[id(gradient)] for gradient in gradients if id(gradient) in self._own]
        square = self.partitions[0].new_zeros(1)
        for part in joined(own):
            square += torch.linalg.vector_norm(part).square()
        dist.all_reduce(square, group=self._group)
        return square.sqrt()
