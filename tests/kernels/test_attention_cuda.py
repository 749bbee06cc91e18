"""Attention on a GPU, compared with the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.kernels import hybrid_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("length", [1, 65, 1000])
@pytest.mark.parametrize("gated", [False, True], ids=["allocated", "gated"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_sdpa_equals_the_reference(
    dtype: torch.dtype, tolerance: float, length: int, gated: bool, packed: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, length, heads, 128, device="cuda", dtype=dtype) for heads in (16, 8, 8)
    )
    upstream = torch.randn_like(q)
    gate = torch.rand(2, 8, device="cuda").round(decimals=1) if gated else None
    documents = (
        (torch.arange(length, device="cuda") // 37 * 37).expand(2, -1).int().contiguous()
        if packed
        else None
    )
    window = 32 if gated else (32, length, 32, length, 1, length, 7, 32)

    def run(backend: str, kind: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        z = None if gate is None else gate.detach().requires_grad_()
        out = hybrid_attention(*inputs, window=window, gate=z, documents=documents, backend=backend)
        out.backward(upstream.to(kind))
        return [
            x
            for x in (out, *(x.grad for x in inputs), None if z is None else z.grad)
            if x is not None
        ]

    for result, truth in zip(run("sdpa", dtype), run("reference", torch.float64), strict=True):
        error = (result.double() - truth.double()).norm() / (
            truth.double().norm() + 0.1 * upstream.double().norm()
        )
        assert error <= tolerance
