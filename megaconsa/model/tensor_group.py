"""What a block asks of the ranks that it is divided over."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorGroup(Protocol):
    """The ranks of a tensor group, which divide the parts of a block around attention and the MLP.

    Neither function is differentiable. Each is the other's transpose.
    """

    @property
    def size(self) -> int: ...

    def gather_input(self, x: Tensor) -> Tensor:
        """From the residual stream into a divided part: (B, S / size or S, ...) to (B, S, ...)."""

    def reduce_output(self, x: Tensor) -> Tensor:
        """From a divided part to the residual stream: the sum over the ranks."""


class NoGroup:
    """A block that is not divided."""

    size = 1

    def gather_input(self, x: Tensor) -> Tensor:
        return x

    def reduce_output(self, x: Tensor) -> Tensor:
        return x
