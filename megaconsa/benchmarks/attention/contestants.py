"""The contestants of `bench-attention`: our backends, and peers from other libraries.

Our backends run through `hybrid_attention`. The peers' kernels are called directly.
"""

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
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A peer's function of q, k and v in its own layout."""


@dataclass(frozen=True)
class Run:
    """One contestant, ready for one case: tensors in its own layout, masks built."""

    launches: int
    """Calls of the attention function that make up one pass."""
    leaves: Tensors
    """Inputs whose gradients are computed."""
    forward: Callable[[], Tensors]
    gradients: Tensors
    """Gradients of the outputs of `forward`."""
    collect: Callable[[Tensors, Tensors], Results]
    """Turns outputs and gradients of the leaves into the results that `truth` returns."""

    def backward(self, outputs: Tensors) -> Tensors:
        """Returns the gradients of the leaves."""
        # autograd.grad leaves no .grad behind, so the time measured includes no accumulation.
        return torch.autograd.grad(outputs, self.leaves, self.gradients)


class Contestant(Protocol):
    """An attention implementation that is checked and timed."""

    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool:
        """Whether it is our backend. If one of ours is wrong, no speed is reported at all.

        A peer that is wrong is only left out.
        """

    def serves(self, case: Case) -> bool:
        """Whether it can compute this kind of case at all."""

    def refusal(self, inputs: Inputs) -> str | None:
        """Returns why it will not run here, in one sentence, or None."""

    def prepare(self, inputs: Inputs) -> Run:
        """Returns the contestant ready for the case."""


@dataclass(frozen=True)
class OurBackend:
    """One of our backends, called through the function that models call.

    function: any function with the arguments of `hybrid_attention`.
    sorted_heads: heads come in order of falling window, so that heads with the same window are
    neighbours.
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
            packed=inputs.documents is not None,
            scale=shape.scale,
        )
        return BACKENDS[self.name].refusal(problem)

    def prepare(self, inputs: Inputs) -> Run:
        windows = inputs.case.windows
        heads = list(range(len(windows)))
        if self.sorted_heads:
            heads.sort(key=lambda head: -windows[head])
        queries = query_heads(heads, inputs.shape.group)
        ordered_windows = tuple(windows[head] for head in heads)
        q = inputs.q[:, :, queries].contiguous().requires_grad_()
        k = inputs.k[:, :, heads].contiguous().requires_grad_()
        v = inputs.v[:, :, heads].contiguous().requires_grad_()
        leaves: Tensors = (q, k, v)
        gate = None
        if inputs.gate is not None:
            gate = inputs.gate[heads].requires_grad_()
            leaves = (*leaves, gate)

        def forward() -> Tensors:
            out = self.function(
                q,
                k,
                v,
                window=ordered_windows,
                gate=gate,
                documents=inputs.documents,
                backend=self.name,
            )
            return (out,)

        def collect(outputs: Tensors, gradients: Tensors) -> Results:
            dq, dk, dv, *dz = gradients
            results = {
                "out": _restored(outputs[0], queries),
                "dq": _restored(dq, queries),
                "dk": _restored(dk, heads),
                "dv": _restored(dv, heads),
            }
            if dz:
                results["dz"] = _restored(dz[0], heads, dim=0)
            return results

        gradient = inputs.gradient[:, :, queries].contiguous()
        return Run(1, leaves, forward, (gradient,), collect)


def query_heads(heads: list[int], group: int) -> list[int]:
    """Returns the query heads of these KV heads, in their order."""
    return [head * group + member for head in heads for member in range(group)]


def _restored(x: Tensor, order: list[int], dim: int = 2) -> Tensor:
    """Undoes a permutation by `order` along `dim`."""
    return x.index_select(dim, torch.tensor(order, device=x.device).argsort())


@dataclass(frozen=True)
class Peer:
    """Another library's attention, called on contiguous tensors in the layout that it wants.

    Heads are split into its launches beforehand, outside the time measured.

    build: makes its function of (q, k, v) for a shape, the windows of the KV heads it gets, and
    the documents of `Inputs`.
    heads_first: tensors are (B, heads, S, D) instead of (B, S, heads, D).
    windowed: it supports windows.
    launch_per_window: it takes one launch for the heads of each window. Otherwise one launch takes
    all heads, with a mask per head.
    packed: it supports documents that do not see each other.
    joins_sequences: with documents, tensors are (B S, heads, D).
    """

    name: str
    build: Callable[[Shape, tuple[int, ...], Tensor | None], Attention]
    heads_first: bool
    windowed: bool
    launch_per_window: bool
    packed: bool = False
    joins_sequences: bool = False
    ours: bool = False

    def serves(self, case: Case) -> bool:
        """Whether it can compute this kind of case at all.

        Gated cases take two launches, full and windowed. This is what a gate costs without a
        kernel for it.
        """
        if case.packed and not self.packed:
            return False
        if case.name == "dense":
            return True
        return self.windowed and (case.gate is None or self.launch_per_window)

    def refusal(self, inputs: Inputs) -> str | None:
        return None if inputs.shape.device.type == "cuda" else f"{self.name} needs a CUDA GPU"

    def prepare(self, inputs: Inputs) -> Run:
        launches = [
            _Launch.make(inputs, heads, windows, weight, self)
            for heads, windows, weight in self._split(inputs)
        ]
        functions = [
            self.build(inputs.shape, launch.windows, inputs.documents) for launch in launches
        ]

        def forward() -> Tensors:
            pairs = zip(functions, launches, strict=True)
            return tuple(function(*launch.leaves) for function, launch in pairs)

        def collect(outputs: Tensors, gradients: Tensors) -> Results:
            return _collect(
                inputs,
                launches,
                self._canonical(outputs, inputs),
                self._canonical(gradients, inputs),
            )

        leaves = tuple(leaf for launch in launches for leaf in launch.leaves)
        gradients = tuple(launch.gradient for launch in launches)
        return Run(len(launches), leaves, forward, gradients, collect)

    def _split(self, inputs: Inputs) -> list[tuple[list[int], tuple[int, ...], Tensor | None]]:
        """Returns each launch's KV heads, their windows, and the weight of its output.

        The weight is a tensor with one value per KV head, or None where outputs are not weighted.
        """
        windows = inputs.case.windows
        every = list(range(len(windows)))
        if inputs.gate is not None:
            full_windows = (inputs.shape.length,) * len(every)
            return [(every, full_windows, inputs.gate), (every, windows, 1 - inputs.gate)]
        if not self.launch_per_window:
            return [(every, windows, None)]
        launches: list[tuple[list[int], tuple[int, ...], Tensor | None]] = []
        for window in sorted(set(windows), reverse=True):
            heads = [head for head in every if windows[head] == window]
            launches.append((heads, (window,) * len(heads), None))
        return launches

    def _native(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Returns a (B, S, heads, D) tensor in the peer's layout, contiguous."""
        if self.joins_sequences and inputs.documents is not None:
            x = x.flatten(0, 1)
        elif self.heads_first:
            x = x.transpose(1, 2)
        return x.contiguous()

    def _canonical(self, tensors: Tensors, inputs: Inputs) -> Tensors:
        """Returns tensors in the peer's layout as (B, S, heads, D)."""
        if self.joins_sequences and inputs.documents is not None:
            return tuple(x.unflatten(0, (inputs.shape.batch, -1)) for x in tensors)
        if self.heads_first:
            return tuple(x.transpose(1, 2) for x in tensors)
        return tensors


@dataclass(frozen=True)
class _Launch:
    """One call of a peer's attention function, and its tensors."""

    heads: list[int]
    """KV heads."""
    queries: list[int]
    """Query heads."""
    windows: tuple[int, ...]
    weight: Tensor | None
    """Weight of the output, fp32 (query heads, 1), if it is a part of a gated output."""
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
        gradient = inputs.gradient[:, :, queries]
        if weight is not None:
            weight = weight.repeat_interleave(group)[:, None]
            gradient = (weight * gradient).to(gradient.dtype)
        parts = (inputs.q[:, :, queries], inputs.k[:, :, heads], inputs.v[:, :, heads])
        leaves = tuple(peer._native(x, inputs).requires_grad_() for x in parts)
        return _Launch(heads, queries, windows, weight, leaves, peer._native(gradient, inputs))


def _collect(
    inputs: Inputs, launches: list[_Launch], outputs: Tensors, gradients: Tensors
) -> Results:
    """Combines the results of the launches in fp32, outside the time measured."""
    results = {
        "out": torch.zeros_like(inputs.q, dtype=torch.float32),
        "dq": torch.zeros_like(inputs.q, dtype=torch.float32),
        "dk": torch.zeros_like(inputs.k, dtype=torch.float32),
        "dv": torch.zeros_like(inputs.v, dtype=torch.float32),
    }
    for index, (launch, out) in enumerate(zip(launches, outputs, strict=True)):
        dq, dk, dv = gradients[3 * index : 3 * index + 3]
        weighted = out if launch.weight is None else launch.weight * out
        results["out"][:, :, launch.queries] += weighted
        results["dq"][:, :, launch.queries] += dq
        results["dk"][:, :, launch.heads] += dk
        results["dv"][:, :, launch.heads] += dv
    if inputs.gate is not None:
        # The output is z full + (1 - z) windowed, so its derivative by z is their difference.
        full, windowed = outputs
        difference = (full.double() - windowed.double()) * inputs.gradient.double()
        results["dz"] = difference.sum(dim=(0, 1, 3)).view(-1, inputs.shape.group).sum(dim=1)
    return results
