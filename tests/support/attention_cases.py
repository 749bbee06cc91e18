"""Attention problems for the kernel tests.

This module draws them, runs them, and compares the results with the fp64 reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.head_pattern import HeadPattern

Attention = Callable[..., Tensor]
"""The signature of `reference.attention`."""

FULL = 2**31 - 1
BLOCK_EDGES = tuple(edge + step for edge in (16, 32, 64, 128) for step in (-1, 0, 1))
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Case:
    """A problem in plain values. A failing test prints all that is needed to repeat it."""

    length: int
    windows: tuple[int, ...]
    """One window per KV head."""
    gate: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    """One gate per KV head, or one per batch row and KV head."""
    documents: tuple[tuple[int, ...], ...] | None = None
    """The lengths of the documents of each batch row."""
    batch: int = 1
    group: int = 1
    dim: int = 16
    scale: float | None = None
    seed: int = 0
    earlier_keys: int = 0
    """Tokens at the start of a sequence without a query."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem.

    gate: (kv_heads,) or (B, kv_heads).
    upstream: the gradient of the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    windows: tuple[int, ...]
    gate: Tensor | None
    documents: Tensor | None
    scale: float

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Returns the same inputs with q, k, v and upstream changed."""
        return replace(
            self,
            q=change(self.q),
            k=change(self.k),
            v=change(self.v),
            upstream=change(self.upstream),
        )

    def double(self) -> Inputs:
        return replace(
            self.map(Tensor.double), gate=None if self.gate is None else self.gate.double()
        )


def draw(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Draws standard normal tensors.

    They are drawn on the CPU, so that the values are the same on every device.
    """
    generator = torch.Generator().manual_seed(case.seed)
    kv_heads = len(case.windows)

    def normal(heads: int, first: int = 0) -> Tensor:
        whole = torch.randn(case.batch, case.length, heads, case.dim, generator=generator)
        return whole[:, first:].contiguous().to(device, dtype)

    return Inputs(
        q=normal(kv_heads * case.group, case.earlier_keys),
        k=normal(kv_heads),
        v=normal(kv_heads),
        upstream=normal(kv_heads * case.group, case.earlier_keys),
        windows=case.windows,
        gate=None if case.gate is None else torch.tensor(case.gate, device=device),
        documents=None if case.documents is None else document_ids(case.documents).to(device),
        scale=case.dim**-0.5 if case.scale is None else case.scale,
    )


def document_ids(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Makes document ids from the lengths of the documents of each row.

    The id of a document is the position where it starts. Returns int32 (B, S).
    """
    ids = [
        [
            start
            for start, length in zip(accumulate(row, initial=0), row, strict=False)
            for _ in range(length)
        ]
        for row in rows
    ]
    return torch.tensor(ids, dtype=torch.int32)


def random_documents(length: int, batch: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Cuts each row at random positions, some of them adjacent.

    There is about one document per 13 tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def row() -> tuple[int, ...]:
        cuts = (torch.rand(length - 1, generator=generator) < 1 / 13).nonzero().flatten() + 1
        bounds = [0, *cuts.tolist(), length]
        return tuple(stop - start for start, stop in pairwise(bounds))

    return tuple(row() for _ in range(batch))


def random_gate(batch: int, kv_heads: int, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """Gates as in learning: hard concrete, some of them exactly 0 and some exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    gates = (torch.rand(batch, kv_heads, generator=generator) * 2 - 0.5).clamp(0, 1)
    return tuple(map(tuple, gates.tolist()))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new allocation with NaN, or with the largest value for integers.

    A kernel that reads what it has not written then gives a wrong result.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    attention: Attention, inputs: Inputs, needed: tuple[str, ...] = ("q", "k", "v", "gate")
) -> dict[str, Tensor]:
    """Runs a forward and a backward pass.

    needed: the inputs that need a gradient.
    Returns the output as `out`, and the gradients as `q`, `k`, `v` and `gate`.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name in needed
        if (x := getattr(inputs, name)) is not None
    }
    with_leaves = replace(inputs, **leaves)
    gate = with_leaves.gate
    if gate is not None:
        gate = gate.expand(inputs.q.shape[0], inputs.k.shape[2])
    with poisoned_memory():
        out = attention(
            with_leaves.q,
            with_leaves.k,
            with_leaves.v,
            HeadPattern(inputs.windows, gate),
            inputs.documents,
            inputs.scale,
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), inputs.upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(results: dict[str, Tensor], inputs: Inputs) -> dict[str, float]:
    """The error of the output and of each gradient.

    It is ||result - truth|| / (||truth|| + 0.1 ||upstream||). The gradient of a gate that is
    exactly 0 or 1 must be exactly 0. This is the derivative of the clamp of the hard concrete.
    """
    wide = inputs.double()
    truths = run(reference.attention, wide, tuple(name for name in results if name != "out"))
    measured = {}
    for name, result in results.items():
        truth = truths[name]
        assert result.shape == truth.shape
        if name == "gate":
            assert inputs.gate is not None
            inside = (inputs.gate > 0) & (inputs.gate < 1)
            assert not result[~inside].any()
            result = result[inside]
            truth = truth[inside]
        measured[name] = float(
            (result.double() - truth).norm() / (truth.norm() + 0.1 * wide.upstream.norm())
        )
    return measured


def check(attention: Attention, inputs: Inputs, tolerance: float) -> None:
    """Checks the output and the gradients.

    They must have the precision of the inputs and be within the tolerance of the reference.
    """
    results = run(attention, inputs)
    for name, result in results.items():
        assert result.dtype == (torch.float32 if name == "gate" else inputs.q.dtype)
    measured = errors(results, inputs)
    assert all(error <= tolerance for error in measured.values()), measured


def assert_same_bits(results: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    different = [name for name, result in results.items() if not torch.equal(result, others[name])]
    assert not different
