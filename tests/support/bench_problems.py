"""Small problems for the tests of bench-attention."""

from __future__ import annotations

import pytest
import torch

from megaconsa.benchmarks.attention.cases import Inputs, Shape, all_cases, draw
from megaconsa.benchmarks.attention.contestants import OurBackend, Peer
from megaconsa.benchmarks.attention.truth import Results

CPU = torch.device("cpu")
SHAPE = Shape(2, 37, 6, 3, 8, 5, torch.float32, CPU, document_median=12)
NAMES = [
    "dense",
    "window",
    "mixed",
    "gated",
    "gated-half",
    "gated-partly",
    "packed",
    "packed-mixed",
    "packed-gated",
]

every_case = pytest.mark.parametrize("name", NAMES)


def inputs_of(name: str, shape: Shape = SHAPE) -> Inputs:
    """Draws the inputs of a case by its name."""
    return draw(shape, next(case for case in all_cases(shape) if case.name == name))


def results_of(contestant: OurBackend | Peer, inputs: Inputs) -> Results:
    """Runs the forward and backward pass of a contestant."""
    run = contestant.prepare(inputs)
    outputs = run.forward()
    return run.collect(tuple(x.detach() for x in outputs), run.backward(outputs))
