"""Precisions, tolerances and the head dimension of the tests of the Triton kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from megaconsa.kernels.attention.triton.operators import attention
from tests.support.attention_cases import Case, check, draw

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DIM = 128

every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=list(NAMES.values()))
widest_and_narrowest = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]
)


def check_on_gpu(case: Case, dtype: torch.dtype) -> None:
    """Draws a case on the GPU and checks the kernels with the tolerance of the precision."""
    check(attention, draw(case, "cuda", dtype), TOLERANCES[dtype])
