"""Finds the fastest launches of the portable Triton kernels for a shape, on the current GPU.

A candidate must first give the right result. The fastest of those wins.
"""

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
from megaconsa.kernels.attention.triton.backward_operator import backward
from megaconsa.kernels.attention.triton.forward_operator import forward

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
"""Launches to try, by pass and element width: the packaged launches and others near them."""

CASES = {"mixed": "", "gated": "/gated"}
"""Cases that are measured, and the suffix of the table entry that each one tunes.

Full and windowed heads alternate in the case mixed. Heads compute both softmaxes in the case gated.
"""


@dataclass(frozen=True)
class Trial:
    """The result of one candidate."""

    case: str
    step: str
    launch: Launch
    milliseconds: float | None
    """Median time of the pass, or None for a candidate that was rejected."""
    reason: str = ""
    """Why it was rejected."""


def refusal(shape: Shape) -> str | None:
    """Returns why there is nothing to tune for the shape on its GPU, in one sentence, or None."""
    capability = torch.cuda.get_device_capability(shape.device)
    if is_fixed(architecture_key(capability), shape_key(shape.dtype, shape.head_dim)):
        return (
            f"the Hopper kernels serve head_dim {shape.head_dim} in 16 bits on this GPU, "
            "and their launches are fixed"
        )
    return None


def tune(shape: Shape, notify: Callable[[Trial], None]) -> Table:
    """Finds the fastest right candidate of both passes, for allocated and for gated heads.

    notify: called with the result of every candidate.

    Returns a launch table that has only these entries. Raises RuntimeError if no candidate is
    right.
    """
    key = shape_key(shape.dtype, shape.head_dim)
    width = key.split("/")[0]
    steps: dict[str, dict[str, Launch]] = {"forward": {}, "backward": {}}
    for case in all_cases(shape):
        if case.name not in CASES:
            continue
        small = _Passes(draw(shape.small(), case))
        large = _Passes(draw(shape, case))
        for step, entries in steps.items():
            best = _fastest(step, CANDIDATES[step, width], small, large, notify)
            entries[key + CASES[case.name]] = best
            if step == "forward":
                # The backward pass needs the right results of a forward pass. The last candidate
                # may have left wrong ones, or none.
                with forced(forward=best, backward=best):
                    small.forward()
                    large.forward()
    return {architecture_key(torch.cuda.get_device_capability(shape.device)): steps}


class _Passes:
    """Both passes of a problem. The backward pass uses what the last forward pass saved."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.gate: Tensor | None = None
        if inputs.gate is not None:
            self.gate = inputs.gate.expand(inputs.shape.batch, -1).contiguous()
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
        if self.gate is not None:
            results["dz"] = gradients[3].sum(0)
        return results


def _fastest(
    step: str,
    candidates: tuple[Launch, ...],
    small: _Passes,
    large: _Passes,
    notify: Callable[[Trial], None],
) -> Launch:
    """Returns the candidate with the shortest median among those that are right.

    A candidate is right if it agrees with the truth on the small problem.
    """
    expected = truth(small.inputs)
    bound = BOUNDS[small.inputs.shape.dtype]
    timed: dict[Launch, float] = {}
    for launch in candidates:
        milliseconds = None
        reason = ""
        try:
            with forced(forward=launch, backward=launch):
                results = getattr(small, step)()
                expected_here = {name: expected[name] for name in results}
                found = errors(results, expected_here, small.inputs)
                # Written so that NaN counts as wrong.
                if all(error <= bound for error in found.values()):
                    milliseconds = do_bench(getattr(large, step), return_mode="median")
                    timed[launch] = milliseconds
                else:
                    reason = "wrong"
        except OutOfResources:
            reason = "does not fit"
        notify(Trial(small.inputs.case.name, step, launch, milliseconds, reason))
    if not timed:
        raise RuntimeError(f"no candidate serves the {step} pass of {small.inputs.case.name} here")
    return min(timed, key=timed.__getitem__)
