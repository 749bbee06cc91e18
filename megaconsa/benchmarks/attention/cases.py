"""What `bench-attention` times: the cases, which differ in windows and gates alone, and the tensors that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHECKED_LENGTH = 1024
"""Longest sequence of the small problem on which everybody is checked before anything is timed."""

PARTLY_CLOSED = (0.0, 0.5, 1.0, 0.0, 0.7, 0.0, 0.2, 0.9)
"""Gates on the way to a finished allocation: 3 of 8 closed, one fully open."""


@dataclass(frozen=True)
class Shape:
    """One attention problem; `window` is that of the windowed heads, in keys with the query's own."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def small(self) -> Shape:
        """A problem of the same kind that is quickly checked: same heads, at most two sequences of about 1024 tokens.

        The window shrinks too, since one key too many weighs little in a long one.
        """
        length, window = (
            _shrunk(self.length, CHECKED_LENGTH),
            _shrunk(self.window, CHECKED_LENGTH // 4),
        )
        return replace(self, batch=min(self.batch, 2), length=length, window=window)


@dataclass(frozen=True)
class Case:
    """Windows (one per KV head; the length or more is full attention) and, while masks are learned, gates."""

    name: str
    description: str
    windows: tuple[int, ...]
    gate: tuple[float, ...] | None

    def pairs(self, visible_pairs: Callable[[int, int], int], length: int) -> int:
        """(query, key) pairs of one query head of every KV head, by `visible_pairs(length, window)`.

        A head counts as full where its gate is above 0: the windowed output is a part of that pass.
        """
        gate = (0.0,) * len(self.windows) if self.gate is None else self.gate
        return sum(
            visible_pairs(length, length if z > 0 else window)
            for window, z in zip(self.windows, gate, strict=True)
        )


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: q and the gradient of the output (B, S, heads, D), k and v (B, S, kv_heads, D), gate fp32 (kv_heads,)."""

    shape: Shape
    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor
    gate: Tensor | None


def all_cases(shape: Shape) -> list[Case]:
    """The cases by name. Windowed heads alternate with full ones, beginning with a full one."""
    count, length, window = shape.kv_heads, shape.length, shape.window
    windowed = (window,) * count
    mixed = tuple((length, window)[head % 2] for head in range(count))
    partly = tuple(PARTLY_CLOSED[head % len(PARTLY_CLOSED)] for head in range(count))
    return [
        Case("dense", "every head full", (length,) * count, None),
        Case("window", f"every head W={window}", windowed, None),
        Case("mixed", f"full and W={window} heads in turn", mixed, None),
        Case("gated", "every z = 0.5", windowed, (0.5,) * count),
        Case(
            "gated-half",
            "z = 1 and 0 in turn: the heads of mixed",
            windowed,
            tuple((1.0, 0.0)[h % 2] for h in range(count)),
        ),
        Case(
            "gated-partly",
            "3 of 8 gates at 0: z = " + ", ".join(f"{z:g}" for z in partly),
            windowed,
            partly,
        ),
    ]


def _shrunk(size: int, largest: int) -> int:
    """At most `largest`, with the remainder by 128 kept: blocks divide it, or not, as they do `size`."""
    return size if size <= largest else largest - (-size) % 128


def draw(shape: Shape, case: Case) -> Inputs:
    """Standard normal q, k, v and gradient, the same ones for every case of a shape."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, shape.length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=shape.device, dtype=shape.dtype)

    q, k, v, gradient = (
        normal(shape.heads),
        normal(shape.kv_heads),
        normal(shape.kv_heads),
        normal(shape.heads),
    )
    gate = (
        None
        if case.gate is None
        else torch.tensor(case.gate, device=shape.device, dtype=torch.float32)
    )
    return Inputs(shape, case, q, k, v, gradient, gate)
