"""Whom `bench-attention` times: our backends behind `hybrid_attention`, and other libraries' kernels called bare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaconsa.benchmarks.attention.cases import Case, Inputs, Shape
from megaconsa.benchmarks.attention.truth import Results
from megaconsa.kernels.attention.backends import BACKENDS
from megaconsa.kernels.attention.hybrid_attention import hybrid_attention
from megaconsa.kernels.attention.problem import Problem

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """One contestant made ready for one case: tensors in its own layout, masks built."""

    launches: int
    """Calls of the attention that make up one pass."""
    leaves: Tensors
    forward: Callable[[], Tensors]
    gradients: Tensors
    """Of the outputs of `forward`."""
    collect: Callable[[Tensors, Tensors], Results]
    """Outputs, and gradients of the leaves, as the results that `truth` gives."""

    def backward(self, outputs: Tensors) -> Tensors:
        # autograd.grad leaves no .grad behind, so that nothing is accumulated inside the time measured.
        return torch.autograd.grad(outputs, self.leaves, self.gradients)


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool:
        """Whether a wrong result forbids to report any speed; a peer that is wrong is only left out."""

    def serves(self, case: Case) -> bool:
        """Whether the case is of the kind that it computes at all."""

    def refusal(self, inputs: Inputs) -> str | None:
        """Why it will not run here, in one sentence."""

    def prepare(self, inputs: Inputs) -> Run: ...


@dataclass(frozen=True)
class OurBackend:
    """One of our backends, through the function that models call: any with the arguments of `hybrid_attention`.

    sorted_heads: heads are given by falling window, so that those of a kind are neighbours.
    """

    name: str
    function: Callable[..., Tensor] = hybrid_attention
    sorted_heads: bool = False
    ours: bool = True

    def serves(self, case: Case) -> bool:
        return True

    def refusal(self, inputs: Inputs) -> str | None:
        shape = inputs.shape
        problem = Problem(
            device=shape.device,
            dtype=shape.dtype,
            batch=shape.batch,
            length=shape.length,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            windows=inputs.case.windows,
            gated=inputs.gate is not None,
            packed=False,
            scale=shape.scale,
        )
        return BACKENDS[self.name].refusal(problem)

    def prepare(self, inputs: Inputs) -> Run:
        windows = inputs.case.windows
        heads = list(range(len(windows)))
        if self.sorted_heads:
            heads.sort(key=lambda head: -windows[head])
        queries = query_heads(heads, inputs.shape.group)
        given = tuple(windows[head] for head in heads)
        q, k, v = leaves = tuple(
            x[:, :, order].contiguous().requires_grad_()
            for x, order in ((inputs.q, queries), (inputs.k, heads), (inputs.v, heads))
        )
        gate = None
        if inputs.gate is not None:
            gate = inputs.gate[heads].requires_grad_()
            leaves = (*leaves, gate)

        def forward() -> Tensors:
            return (self.function(q, k, v, window=given, gate=gate, backend=self.name),)

        def collect(outputs: Tensors, gradients: Tensors) -> Results:
            out, (dq, dk, dv, *dz) = outputs[0], gradients
            restored = {"out": _restored(out, queries), "dq": _restored(dq, queries)}
            restored |= {"dk": _restored(dk, heads), "dv": _restored(dv, heads)}
            return restored | ({"dz": _restored(dz[0], heads, dim=0)} if dz else {})

        return Run(1, leaves, forward, (inputs.gradient[:, :, queries].contiguous(),), collect)


def query_heads(heads: list[int], group: int) -> list[int]:
    """The query heads of these KV heads."""
    return [head * group + member for head in heads for member in range(group)]


def _restored(x: Tensor, order: list[int], dim: int = 2) -> Tensor:
    """Undoes the choice of `order` along `dim`."""
    return x.index_select(dim, torch.tensor(order, device=x.device).argsort())


@dataclass(frozen=True)
class Peer:
    """Another library's attention, on contiguous tensors of the layout and the heads that it wants, split beforehand.

    heads_first: (B, heads, S, D) instead of (B, S, heads, D).
    windowed: it has windows. launch_per_window: one launch for the heads of each window; else one for all, with a mask per head.
    build: makes its function of (q, k, v) for a shape and the windows of the KV heads it gets.
    """

    name: str
    build: Callable[[Shape, tuple[int, ...]], Callable[[Tensor, Tensor, Tensor], Tensor]]
    heads_first: bool
    windowed: bool
    launch_per_window: bool
    ours: bool = False

    def serves(self, case: Case) -> bool:
        """Gates are served by two launches, full and windowed: what a gate costs without a kernel for it."""
        return case.name == "dense" or (
            self.windowed and (case.gate is None or self.launch_per_window)
        )

    def refusal(self, inputs: Inputs) -> str | None:
        return None if inputs.shape.device.type == "cuda" else f"{self.name} needs a CUDA GPU"

    def prepare(self, inputs: Inputs) -> Run:
        launches = [
            _Launch.make(inputs, heads, windows, weight, self)
            for heads, windows, weight in self._split(inputs)
        ]
        functions = [self.build(inputs.shape, launch.windows) for launch in launches]

        def forward() -> Tensors:
            return tuple(
                function(*launch.leaves)
                for function, launch in zip(functions, launches, strict=True)
            )

        def collect(outputs: Tensors, gradients: Tensors) -> Results:
            return _collect(inputs, launches, self._canonical(outputs), self._canonical(gradients))

        leaves = tuple(leaf for launch in launches for leaf in launch.leaves)
        return Run(
            len(launches), leaves, forward, tuple(launch.gradient for launch in launches), collect
        )

    def _split(self, inputs: Inputs) -> list[tuple[list[int], tuple[int, ...], Tensor | None]]:
        """KV heads, windows and weight of the output (one per KV head) of each launch."""
        windows, length = inputs.case.windows, inputs.shape.length
        every = list(range(len(windows)))
        if inputs.gate is not None:
            return [(every, (length,) * len(every), inputs.gate), (every, windows, 1 - inputs.gate)]
        if not self.launch_per_window:
            return [(every, windows, None)]
        kinds = sorted(set(windows), reverse=True)
        return [
            ([head for head in every if windows[head] == kind], (kind,) * windows.count(kind), None)
            for kind in kinds
        ]

    def _native(self, x: Tensor) -> Tensor:
        """(B, S, heads, D) in the peer's layout, contiguous."""
        return (x.transpose(1, 2) if self.heads_first else x).contiguous()

    def _canonical(self, tensors: Tensors) -> Tensors:
        return tuple(x.transpose(1, 2) for x in tensors) if self.heads_first else tensors


@dataclass(frozen=True)
class _Launch:
    heads: list[int]
    """KV heads."""
    queries: list[int]
    """Query heads."""
    windows: tuple[int, ...]
    weight: Tensor | None
    """Of the output, fp32 (query heads, 1), where it is a part of a gated output."""
    leaves: Tensors
    gradient: Tensor

    @staticmethod
    def make(
        inputs: Inputs,
        heads: list[int],
        windows: tuple[int, ...],
        weight: Tensor | None,
        peer: Peer,
    ) -> _Launch:
        group = inputs.shape.group
        queries = query_heads(heads, group)
        weight = None if weight is None else weight.repeat_interleave(group)[:, None]
        gradient = inputs.gradient[:, :, queries]
        if weight is not None:
            gradient = (weight * gradient).to(gradient.dtype)
        parts = (inputs.q[:, :, queries], inputs.k[:, :, heads], inputs.v[:, :, heads])
        leaves = tuple(peer._native(x).requires_grad_() for x in parts)
        return _Launch(heads, queries, windows, weight, leaves, peer._native(gradient))


def _collect(
    inputs: Inputs, launches: list[_Launch], outputs: Tensors, gradients: Tensors
) -> Results:
    """The launches' results put together in fp32, outside the time measured."""
    wide = [
        torch.zeros_like(x, dtype=torch.float32) for x in (inputs.q, inputs.q, inputs.k, inputs.v)
    ]
    results = dict(zip(("out", "dq", "dk", "dv"), wide, strict=True))
    for index, (launch, out) in enumerate(zip(launches, outputs, strict=True)):
        dq, dk, dv = gradients[3 * index : 3 * index + 3]
        results["out"][:, :, launch.queries] += (
            out if launch.weight is None else launch.weight * out
        )
        results["dq"][:, :, launch.queries] += dq
        results["dk"][:, :, launch.heads] += dk
        results["dv"][:, :, launch.heads] += dv
    if inputs.gate is not None:
        full, windowed = outputs
        difference = (full.double() - windowed.double()) * inputs.gradient.double()
        results["dz"] = difference.sum(dim=(0, 1, 3)).view(-1, inputs.shape.group).sum(dim=1)
    return results
