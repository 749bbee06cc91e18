"""What a block asks of the ranks that it is divided over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class TensorGroup(Protocol):
    """The ranks of a tensor group, which divide the parts of a block around attention and the MLP.

    No function is differentiable. Gathering and reducing are each other's transpose. What begins
    with `start` returns at once: the ranks exchange while this one goes on, until it calls the
    function that it got.
    """

    @property
    def size(self) -> int: ...

    def gather_input(self, x: Tensor) -> Tensor:
        """From the residual stream into a divided part: (B, S / size or S, ...) to (B, S, ...)."""

    def reduce_output(self, x: Tensor) -> Tensor:
        """From a divided part to the residual stream: the sum over the ranks."""

    def start_gather_input(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts `gather_input`. Returns a function that waits for its result."""

    def start_reduce_output(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts `reduce_output`. Returns a function that waits for its result."""


class NoGroup:
    """A block that is not divided."""

    size = 1

    def gather_input(self, x: Tensor) -> Tensor:
        return x

    def reduce_output(self, x: Tensor) -> Tensor:
        return x

    def start_gather_input(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def start_reduce_output(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x
