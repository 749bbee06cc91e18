"""Tensor parallelism: what the ranks of a tensor group exchange.

Attention heads, MLP columns and the vocabulary are divided over the group (Megatron-LM, arXiv
1909.08053). Without sequence parallelism every rank holds the whole residual stream. With it (arXiv
2205.05198) each rank holds a part of the sequence, so norms and residual additions are divided too.
The traffic is the same, because an all-reduce is a reduce-scatter and an all-gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place in its tensor group. With size 1 nothing is exchanged."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """torch.distributed's group of the tensor ranks."""
    sequence: bool = False
    """Sequence parallelism: in the residual stream each rank holds S / size consecutive tokens."""

    def enter(self, x: Tensor) -> Tensor:
        """`gather_input`, differentiable."""
        if self.size == 1:
            return x
        entered: Tensor = _Enter.apply(x, self)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """`reduce_output`, differentiable."""
        if self.size == 1:
            return x
        left: Tensor = _Leave.apply(x, self)
        return left

    def gather_input(self, x: Tensor) -> Tensor:
        """Enters a divided part of the model: (B, S or S / size, ...) to (B, S, ...) on every
        rank. Not differentiable."""
        return self.start_gather_input(x)()

    def reduce_output(self, x: Tensor) -> Tensor:
        """Returns to the residual stream: sums (B, S, ...) over the ranks. Not differentiable.

        Every rank gets the whole sum, or its part of the sequence with sequence parallelism.
        """
        return self.start_reduce_output(x)()

    def start_gather_input(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts `gather_input`. Returns a function that waits for its result."""
        if self.size == 1 or not self.sequence:
            return lambda: x
        return self._start_all_gather_sequence(x)

    def start_reduce_output(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts `reduce_output`. Returns a function that waits for its result."""
        if self.size == 1:
            return lambda: x
        if self.sequence:
            return self._start_reduce_scatter_sequence(x)
        # A collective ignores strides.
        total = x.clone(memory_format=torch.contiguous_format)
        work: Any = dist.all_reduce(total, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return total

        return wait

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place. Not differentiable."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The maximum over the ranks, in place. Not differentiable."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape, in the order of ranks."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def all_gather_sequence(self, x: Tensor) -> Tensor:
        """(B, S / size, ...) to (B, S, ...)."""
        return self._start_all_gather_sequence(x)()

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        """(B, S, ...) to (B, S / size, ...): this rank's part of the sum over the ranks."""
        return self._start_reduce_scatter_sequence(x)()

    def _start_all_gather_sequence(self, x: Tensor) -> Callable[[], Tensor]:
        x = x.contiguous()
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        work: Any = dist.all_gather_into_tensor(gathered, x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return gathered.unflatten(0, (self.size, -1)).movedim(0, 1).flatten(1, 2)

        return wait

    def _start_reduce_scatter_sequence(self, x: Tensor) -> Callable[[], Tensor]:
        stretches = x.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        own = torch.empty_like(stretches[0])
        work: Any = dist.reduce_scatter_tensor(
            own, stretches.flatten(0, 1), group=self.group, async_op=True
        )

        def wait() -> Tensor:
            work.wait()
            return own

        return wait


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        entered = tp.gather_input(x)
        return x.view_as(x) if entered is x else entered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.reduce_output(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.reduce_output(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.gather_input(gradient), None
