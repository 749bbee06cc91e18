"""Initial weights: each is a function of the seed and the parameter's name alone.

The topology of a run therefore does not change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.model.config import ModelConfig

PIECE = 1 << 20
"""Values that are drawn at a time.

torch draws a normal tensor in blocks of 16 values, so drawing it in multiples of 16 changes no
value."""
BLOCK = 16
"""Fewest values that torch draws in this way."""


def initial_weight(name: str, shape: torch.Size, model_config: ModelConfig, seed: int) -> Tensor:
    """fp32 weights of a parameter: ones for norms, otherwise normal.

    name: the canonical name. The standard deviation is `config.initializer_range`.
    """
    everything = tuple(slice(0, size) for size in shape)
    return InitialWeight(name, shape, model_config, seed)[everything]


class InitialWeight:
    """The values of `initial_weight`, of which only slices are kept in memory.

    The values before a slice must be drawn too, because torch's generator cannot skip them. Rows
    are best taken in ascending order. Otherwise drawing starts again.
    """

    def __init__(self, name: str, shape: torch.Size, model_config: ModelConfig, seed: int) -> None:
        self.shape = shape
        self._is_norm = name.endswith("norm.weight")
        self._deviation = model_config.initializer_range
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        # 63 bits of the digest.
        self._seed = int.from_bytes(digest[:8], "little") >> 1
        self._restart()

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """index: a slice with both ends for each dimension."""
        rows, *columns = index
        size = (rows.stop - rows.start, *self.shape[1:])
        if self._is_norm:
            return torch.ones(size)[:, *columns]
        width = self.shape[1:].numel()
        values = torch.empty(size)
        self._fill(values.view(-1), rows.start * width)
        return values[:, *columns]

    def _fill(self, values: Tensor, begin: int) -> None:
        """Sets `values` to the weight's own from `begin` on, counted in the flattened weight."""
        if begin < self._begin:
            self._restart()
        end = begin + len(values)
        while begin < end:
            while begin >= self._begin + len(self._piece):
                self._draw()
            offset = begin - self._begin
            found = self._piece[offset : offset + end - begin]
            values[: len(found)] = found
            values = values[len(found) :]
            begin += len(found)

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._begin = 0
        self._piece = torch.empty(0)

    def _draw(self) -> None:
        """Draws the next piece. The last one takes what would be less than a block."""
        self._begin += len(self._piece)
        left = self.shape.numel() - self._begin
        size = PIECE if left >= PIECE + BLOCK else left
        self._piece = torch.empty(size).normal_(0.0, self._deviation, generator=self._generator)


@contextmanager
def without_defaults() -> Iterator[None]:
    """Context in which modules leave their weights as memory holds them.

    Their default values take seconds per billion weights. Every weight must be set afterwards.
    """
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    resets = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for kind, reset in zip(kinds, resets, strict=True):
            kind.reset_parameters = reset
