"""Finding the fastest launches of the portable Triton kernels for a shape, on the GPU at hand: first right, then fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import OutOfResources
from triton.testing import do_bench

from megaconsa.benchmarks.attention.cases import Inputs, Shape, all_cases, draw
from megaconsa.benchmarks.attention.timing import BOUNDS, errors
from megaconsa.benchmarks.attention.truth import Results, truth
from megaconsa.kernels.attention.launch import (
    Launch,
    Table,
    architecture_key,
    forced,
    is_fixed,
    shape_key,
)
from megaconsa.kernels.attention.triton.operators import backward, forward

CANDIDATES = {
    ("forward", "16-bit"): (
        Launch(128, 128, 8, 3),
        Launch(128, 128, 8, 2),
        Launch(128, 64, 8, 3),
        Launch(128, 64, 8, 2),
        Launch(128, 64, 4, 2),
        Launch(128, 32, 8, 2),
        Launch(128, 32, 4, 2),
        Launch(64, 64, 8, 2),
        Launch(64, 64, 4, 3),
        Launch(64, 64, 4, 2),
        Launch(64, 32, 4, 2),
    ),
    ("forward", "fp32"): (
        Launch(128, 32, 8, 2),
        Launch(64, 64, 8, 2),
        Launch(64, 64, 8, 1),
        Launch(64, 32, 8, 2),
        Launch(64, 32, 4, 2),
        Launch(64, 32, 4, 1),
        Launch(64, 32, 8, 1),
        Launch(64, 16, 4, 1),
        Launch(32, 32, 8, 1),
        Launch(32, 32, 4, 2),
        Launch(32, 16, 8, 1),
        Launch(32, 16, 4, 1),
        Launch(16, 16, 8, 1),
    ),
    ("backward", "16-bit"): (
        Launch(64, 128, 8, 2),
        Launch(64, 128, 8, 1),
        Launch(32, 128, 8, 2),
        Launch(32, 128, 8, 1),
        Launch(64, 64, 8, 2),
        Launch(64, 64, 8, 1),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 1),
        Launch(32, 64, 8, 1),
        Launch(32, 64, 4, 2),
        Launch(64, 32, 8, 1),
        Launch(32, 32, 8, 1),
    ),
    ("backward", "fp32"): (
        Launch(64, 64, 8, 1),
        Launch(64, 32, 8, 1),
        Launch(64, 32, 4, 1),
        Launch(32, 64, 8, 1),
        Launch(32, 64, 4, 1),
        Launch(32, 32, 8, 1),
        Launch(32, 32, 4, 1),
        Launch(16, 32, 8, 1),
        Launch(16, 16, 8, 1),
    ),
}
"""What is tried, by pass and width of an element: the packaged launches, and others near them."""

CASES = {"mixed": "", "gated": "/gated"}
"""What is measured for the entries of a shape: full and windowed heads in turn; heads that compute both softmaxes."""


@dataclass(frozen=True)
class Trial:
    """What came of one candidate."""

    case: str
    step: str
    launch: Launch
    milliseconds: float | None
    """Median of the pass, or None for a candidate that is left out."""
    reason: str = ""
    """Why it is left out."""


def refusal(shape: Shape) -> str | None:
    """Why there is nothing to tune for the shape on its GPU, in one sentence, or None."""
    capability = torch.cuda.get_device_capability(shape.device)
    if is_fixed(architecture_key(capability), shape_key(shape.dtype, shape.head_dim)):
        return f"the Hopper kernels serve head_dim {shape.head_dim} in 16 bits on this GPU, and their launches are fixed"
    return None


def tune(shape: Shape, notify: Callable[[Trial], None]) -> Table:
    """The fastest right candidate of both passes, for allocated and for gated heads, as a table with these entries alone.

    Raises RuntimeError where no candidate is right.
    """
    key = shape_key(shape.dtype, shape.head_dim)
    steps: dict[str, dict[str, Launch]] = {"forward": {}, "backward": {}}
    for case in all_cases(shape):
        if case.name in CASES:
            small, large = _Passes(draw(shape.small(), case)), _Passes(draw(shape, case))
            for step, entries in steps.items():
                candidates = CANDIDATES[step, key.split("/")[0]]
                best = entries[key + CASES[case.name]] = _fastest(
                    step, candidates, small, large, notify
                )
                if (
                    step == "forward"
                ):  # the last candidate may have left wrong results to the backward pass, or none
                    with forced(forward=best, backward=best):
                        small.forward(), large.forward()
    return {architecture_key(torch.cuda.get_device_capability(shape.device)): steps}


class _Passes:
    """Both passes of a problem. The backward pass takes what the last forward pass left."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.gate = (
            None if inputs.gate is None else inputs.gate.expand(inputs.shape.batch, -1).contiguous()
        )
        self.saved: tuple[Tensor, ...] = ()

    def forward(self) -> Results:
        inputs = self.inputs
        self.saved = forward(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.case.windows,
            self.gate,
            None,
            None,
            inputs.shape.scale,
        )
        return {"out": self.saved[0]}

    def backward(self) -> Results:
        inputs = self.inputs
        gradients = backward(
            inputs.gradient,
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.case.windows,
            self.gate,
            None,
            inputs.shape.scale,
            *self.saved,
        )
        results = dict(zip(("dq", "dk", "dv"), gradients, strict=False))
        return results if self.gate is None else results | {"dz": gradients[3].sum(0)}


def _fastest(
    step: str,
    candidates: tuple[Launch, ...],
    small: _Passes,
    large: _Passes,
    notify: Callable[[Trial], None],
) -> Launch:
    """The candidate with the shortest median among those that give the truth on the small problem."""
    expected, bound = truth(small.inputs), BOUNDS[small.inputs.shape.dtype]
    timed: dict[Launch, float] = {}
    for launch in candidates:
        milliseconds, reason = None, ""
        try:
            with forced(forward=launch, backward=launch):
                results = getattr(small, step)()
                # Written so that NaN is wrong.
                if all(
                    error <= bound
                    for error in errors(
                        results, {n: expected[n] for n in results}, small.inputs
                    ).values()
                ):
                    milliseconds = timed[launch] = do_bench(
                        getattr(large, step), return_mode="median"
                    )
                else:
                    reason = "wrong"
        except OutOfResources:
            reason = "does not fit"
        notify(Trial(small.inputs.case.name, step, launch, milliseconds, reason))
    if not timed:
        raise RuntimeError(f"no candidate serves the {step} pass of {small.inputs.case.name} here")
    return min(timed, key=timed.__getitem__)
