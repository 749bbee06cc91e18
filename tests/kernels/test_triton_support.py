"""Which problems the Triton kernels serve, and which they refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton

from megaconsa.kernels.attention.backends import Problem
from megaconsa.kernels.attention.triton.operators import refusal
from tests.support.attention_cases import HEAD_DIMS

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="Triton compiles for the GPU here: test_triton_cuda.py covers it",
)


def problem(**changes: object) -> Problem:
    values = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "batch": 1,
        "length": 8,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "windows": (4, 8),
        "gated": False,
        "packed": False,
        "scale": 0.25,
    }
    return Problem(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_served(dtype: torch.dtype, head_dim: int) -> None:
    assert refusal(problem(dtype=dtype, head_dim=head_dim, gated=True, packed=True)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 20}, "head_dim .*not 20; take"),
        ({"head_dim": 512}, "head_dim .*not 512; take"),
        ({"dtype": torch.float64}, "float64; take"),
        ({"scale": 0.0}, "positive scale, not 0.0; take"),
        ({"scale": -0.5}, "positive scale, not -0.5; take"),
        ({"scale": float("nan")}, "positive scale, not nan; take"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    sentence = refusal(problem(**changes))
    assert sentence is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(sentence)


def test_a_cpu_is_refused_where_triton_compiles() -> None:
    script = """
import torch
from megaconsa.kernels import hybrid_attention
x = torch.zeros(1, 4, 2, 16)
try:
    hybrid_attention(x, x, x, window=2, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "triton needs a CUDA GPU; take sdpa on this device\n"
