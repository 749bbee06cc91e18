"""The cases of `bench-attention` and their tensors.

Cases differ only in windows, gates and documents. All of them share the other tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaconsa.benchmarks.attention.documents import document_lengths, document_starts

CHECKED_LENGTH = 1024
"""Longest sequence of the small problem on which all are checked before anything is timed."""

CHECKED_DOCUMENT_MEDIAN = 150
"""Largest median length of the documents in the small problem.

A sequence then has several documents, and some of them are longer than the window.
"""

PARTLY_CLOSED = (0.0, 0.5, 1.0, 0.0, 0.7, 0.0, 0.2, 0.9)
"""Gates on the way to a finished allocation: 3 of 8 closed, one fully open."""


@dataclass(frozen=True)
class Shape:
    """The shape of one attention problem.

    window: keys that a windowed head sees, including the query's own.
    document_median: median tokens of a document in packed cases.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype
    device: torch.device
    document_median: int = 600

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def document_lengths(self) -> list[list[int]]:
        """Returns the tokens of the documents in each sequence of a packed case."""
        return document_lengths(self.batch, self.length, self.document_median)

    def small(self) -> Shape:
        """Returns a problem of the same kind that is quick to check.

        It has the same heads and at most two sequences of about 1024 tokens. The window and the
        documents shrink too, because one wrong key changes the result little among many.
        """
        return replace(
            self,
            batch=min(self.batch, 2),
            length=_shrunk(self.length, CHECKED_LENGTH),
            window=_shrunk(self.window, CHECKED_LENGTH // 4),
            document_median=min(self.document_median, CHECKED_DOCUMENT_MEDIAN),
        )


@dataclass(frozen=True)
class Case:
    """The windows, gates and documents of one case."""

    name: str
    description: str
    windows: tuple[int, ...]
    """One per KV head. A window of the sequence length or more is full attention."""
    gate: tuple[float, ...] | None
    """One per KV head, as while masks are learned. None: heads have no gates."""
    packed: bool = False
    """Whether every sequence consists of documents that do not see each other."""

    def pairs(self, attention_pairs: Callable[[list[int], int], int], lengths: list[int]) -> int:
        """Returns the visible (query, key) pairs of one query head of every KV head.

        attention_pairs: gives the pairs of one head for the lengths and a window.
        lengths: tokens of all documents of the batch. Without documents, of all sequences.

        A head with a gate above 0 counts as full, because the full pass already includes the
        windowed output.
        """
        full = max(lengths)
        gate = (0.0,) * len(self.windows) if self.gate is None else self.gate
        total = 0
        for window, z in zip(self.windows, gate, strict=True):
            total += attention_pairs(lengths, full if z > 0 else window)
        return total


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    shape: Shape
    case: Case
    q: Tensor
    """(B, S, heads, D)."""
    k: Tensor
    """(B, S, kv_heads, D), as for v."""
    v: Tensor
    gradient: Tensor
    """Gradient of the output, (B, S, heads, D)."""
    gate: Tensor | None
    """fp32 (kv_heads,)."""
    documents: Tensor | None
    """Index in its sequence at which each position's document starts, int32 (B, S).

    None: a sequence is one document.
    """


def all_cases(shape: Shape) -> list[Case]:
    """Returns all cases of a shape.

    Where both kinds of heads occur, they alternate, and the first head is full.
    """
    count = shape.kv_heads
    length = shape.length
    window = shape.window
    windowed = (window,) * count
    mixed = tuple((length, window)[head % 2] for head in range(count))
    in_turn = tuple((1.0, 0.0)[head % 2] for head in range(count))
    partly = tuple(PARTLY_CLOSED[head % len(PARTLY_CLOSED)] for head in range(count))
    half = (0.5,) * count
    documents = f"documents of {shape.document_median} tokens (median) hidden from each other"
    return [
        Case("dense", "every head full", (length,) * count, None),
        Case("window", f"every head W={window}", windowed, None),
        Case("mixed", f"full and W={window} heads in turn", mixed, None),
        Case("gated", "every z = 0.5", windowed, half),
        Case("gated-half", "z = 1 and 0 in turn: the heads of mixed", windowed, in_turn),
        Case(
            "gated-partly",
            "3 of 8 gates at 0: z = " + ", ".join(f"{z:g}" for z in partly),
            windowed,
            partly,
        ),
        Case("packed", f"every head full, {documents}", (length,) * count, None, packed=True),
        Case(
            "packed-mixed",
            f"full and W={window} heads in turn, {documents}",
            mixed,
            None,
            packed=True,
        ),
        Case("packed-gated", f"every z = 0.5, {documents}", windowed, half, packed=True),
    ]


def _shrunk(size: int, largest: int) -> int:
    """Returns a size of at most `largest`.

    It keeps the remainder by 128, so that kernel blocks divide it exactly if they divide `size`.
    """
    if size <= largest:
        return size
    return largest - (-size) % 128


def draw(shape: Shape, case: Case) -> Inputs:
    """Draws standard normal q, k, v and gradient. They are the same for every case of a shape.

    The documents are the same for every packed case of a shape.
    """
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, shape.length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=shape.device, dtype=shape.dtype)

    q = normal(shape.heads)
    k = normal(shape.kv_heads)
    v = normal(shape.kv_heads)
    gradient = normal(shape.heads)
    gate = None
    if case.gate is not None:
        gate = torch.tensor(case.gate, device=shape.device, dtype=torch.float32)
    documents = None
    if case.packed:
        documents = document_starts(shape.document_lengths()).to(shape.device)
    return Inputs(shape, case, q, k, v, gradient, gate, documents)
