"""The Triton kernels on a GPU at sizes beyond 2^31 elements, a grid axis, and the cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaconsa.kernels.attention.triton.operators import attention
from tests.support.attention_cases import FULL, Case, Inputs, check, draw, errors, random_gate, run
from tests.support.cuda_cases import DIM, TOLERANCES, check_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "tokens", "heads"])
def test_strides_beyond_2_31_elements(axis: int) -> None:
    """The last sequence, token or head starts at least 2^31 elements after the first."""

    def far(x: Tensor) -> Tensor:
        strides = list(x.stride())
        strides[axis] = math.ceil(2**31 / (x.shape[axis] - 1) / 8) * 8
        last = sum(stride * (extent - 1) for stride, extent in zip(strides, x.shape, strict=True))
        buffer = x.new_empty(last + 1)
        return buffer.as_strided(x.shape, strides).copy_(x)

    inputs = draw(
        Case(65, (20, FULL), (0.3, 0.8), ((30, 35),) * 2, batch=2, group=2, dim=DIM),
        "cuda",
        torch.bfloat16,
    )
    check(attention, inputs.map(far), TOLERANCES[torch.bfloat16])


def test_more_than_2_31_elements() -> None:
    """Every tensor has more than 2^31 elements.

    Short documents keep the test fast: the reference of a head is that of a batch of documents.
    """
    length = 2**18
    heads = 66
    document = 128
    assert length * heads * DIM > 2**31

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    torch.manual_seed(0)
    shape = (1, length, heads, DIM)
    inputs = Inputs(
        q=normal(*shape),
        k=normal(*shape),
        v=normal(*shape),
        upstream=normal(1, heads, length, DIM).transpose(1, 2),
        windows=(20,) * heads,
        gate=torch.full((heads,), 0.3, device="cuda"),
        documents=(torch.arange(length, device="cuda", dtype=torch.int32) // document)[None],
        scale=DIM**-0.5,
    )
    results = run(attention, inputs)
    for head in (0, heads // 2, heads - 1):

        def of_head(x: Tensor, head: int = head) -> Tensor:
            return x[0, :, head].reshape(length // document, document, 1, DIM)

        only = slice(head, head + 1)
        assert inputs.gate is not None
        gate = inputs.gate[only]
        part = replace(inputs.map(of_head), windows=(20,), gate=gate, documents=None)
        part_results = {
            name: x[only] if name == "gate" else of_head(x) for name, x in results.items()
        }
        measured = errors(part_results, part)
        assert all(error <= TOLERANCES[torch.bfloat16] for error in measured.values()), measured


def test_more_rows_than_a_grid_axis_holds() -> None:
    batch = 16_400
    heads = 4
    assert batch * heads > 65_535
    check_on_gpu(Case(2, (1, 2), (0.3, 0.8), batch=batch, group=2, dim=DIM), torch.bfloat16)


def test_heads_beyond_the_cache() -> None:
    """The launch is processed in sections of heads and sequences, and the last one is smaller."""
    check_on_gpu(
        Case(
            1000,
            (FULL, 9, 300, 70, FULL, 1, 128, 500),
            random_gate(9, 8),
            batch=9,
            group=2,
            dim=DIM,
        ),
        torch.bfloat16,
    )
