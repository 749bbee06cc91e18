"""Several tensors as one message of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Every tensor begins at a multiple of so many bytes, so that kernels can read it in place."""


@dataclass(frozen=True)
class Layout:
    """Shapes and types of the tensors of a message, in their order."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        return cls(tuple(tuple(x.shape) for x in tensors), tuple(x.dtype for x in tensors))

    def floating(self) -> Layout:
        """The layout of the tensors that have gradients."""
        chosen = [
            (shape, dtype)
            for shape, dtype in zip(self.shapes, self.types, strict=True)
            if dtype.is_floating_point
        ]
        return Layout(tuple(shape for shape, _ in chosen), tuple(dtype for _, dtype in chosen))

    @property
    def places(self) -> list[slice]:
        """The bytes of each tensor in the message."""
        found = []
        begin = 0
        for shape, dtype in zip(self.shapes, self.types, strict=True):
            end = begin + math.prod(shape) * dtype.itemsize
            found.append(slice(begin, end))
            begin = -(-end // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def bytes(self) -> int:
        return self.places[-1].stop


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Copies tensors into one message, uint8 (bytes,)."""
    layout = Layout.of(tensors)
    message = torch.empty(layout.bytes, dtype=torch.uint8, device=tensors[0].device)
    for tensor, part in zip(tensors, unpack(message, layout), strict=True):
        part.copy_(tensor.detach())
    return message


def unpack(message: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of a message, as views of it."""
    return [
        message[place].view(dtype).view(shape)
        for place, shape, dtype in zip(layout.places, layout.shapes, layout.types, strict=True)
    ]
