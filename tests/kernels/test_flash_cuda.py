"""The flash backend with the installed FlashAttention, compared with the fp64 reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import Problem, hybrid_attention
from megaconsa.kernels.attention import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

W = 100
TABLES = {
    "full": (FULL_WINDOW,) * 4,
    "windowed": (W,) * 4,
    "sorted": (FULL_WINDOW, FULL_WINDOW, W, W),
    "alternating": (FULL_WINDOW, W, FULL_WINDOW, W),
    "three kinds": (1, W, W, FULL_WINDOW),
}


def skip_if_refused(dtype: torch.dtype, dim: int) -> None:
    problem = Problem(
        device=torch.device("cuda"),
        dtype=dtype,
        batch=2,
        length=256,
        heads=8,
        kv_heads=4,
        head_dim=dim,
        windows=TABLES["sorted"],
        gated=False,
        packed=False,
        scale=dim**-0.5,
    )
    refusal = backends.BACKENDS["flash"].refusal(problem)
    if refusal is not None:
        pytest.skip(refusal)


def check(
    dtype: torch.dtype,
    length: int,
    group: int,
    dim: int,
    windows: tuple[int, ...],
    *,
    gated: bool = False,
    gate: Tensor | None = None,
    closed: tuple[bool, ...] | None = None,
    documents: Tensor | None = None,
    earlier_keys: int = 0,
) -> None:
    """Checks that errors are at most 5e-3 in bf16.

    They are relative to the norm of the reference plus a tenth of the norm of the upstream
    gradient.
    """
    generator = torch.Generator("cuda").manual_seed(length + dim)
    kv_heads = len(windows)
    q, k, v = (
        torch.randn(2, length, heads, dim, device="cuda", dtype=dtype, generator=generator)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    q = q[:, earlier_keys:]
    upstream = torch.randn(q.shape, device="cuda", dtype=dtype, generator=generator)
    if gated:
        gate = torch.rand(2, kv_heads, device="cuda", generator=generator) * 0.9 + 0.05

    def run(backend: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        z = None
        differentiated = leaves
        if gate is not None:
            z = gate.to(torch.promote_types(kind, torch.float32)).requires_grad_()
            differentiated = [*leaves, z]
        out = hybrid_attention(
            *leaves, window=windows, gate=z, closed=closed, documents=documents, backend=backend
        )
        return [out.detach(), *torch.autograd.grad(out, differentiated, upstream.to(kind))]

    for result, truth in zip(run("flash", dtype), run("reference", torch.float64), strict=True):
        error = (result.double() - truth).norm() / (truth.norm() + 0.1 * upstream.double().norm())
        assert error <= 5e-3


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_equals_the_reference(dtype: torch.dtype, length: int, table: str) -> None:
    skip_if_refused(dtype, 128)
    check(dtype, length, 2, 128, TABLES[table], gated=False)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("earlier_keys", [1, 64, 300, 999])
def test_keys_before_the_first_query(earlier_keys: int, gated: bool) -> None:
    skip_if_refused(torch.bfloat16, 128)
    windows = TABLES["alternating"]
    check(torch.bfloat16, 1000, 2, 128, windows, gated=gated, earlier_keys=earlier_keys)


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_any_group_and_head_dim(group: int, dim: int) -> None:
    skip_if_refused(torch.bfloat16, dim)
    check(torch.bfloat16, 257, group, dim, TABLES["alternating"], gated=False)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("gated", [False, True])
def test_packed_documents(table: str, gated: bool) -> None:
    skip_if_refused(torch.bfloat16, 128)
    documents = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    for begin in (1, 130, 131, 640, 999):
        documents[0, begin:] = begin
    check(torch.bfloat16, 1000, 2, 128, TABLES[table], gated=gated, documents=documents)


@pytest.mark.parametrize("length", [50, 100, 101, 257, 1000])
@pytest.mark.parametrize("dim", [64, 128])
def test_gated_heads(dim: int, length: int) -> None:
    skip_if_refused(torch.bfloat16, dim)
    check(torch.bfloat16, length, 2, dim, TABLES["windowed"], gated=True)


@pytest.mark.parametrize("knows", [False, True])
def test_closed_gates(knows: bool) -> None:
    """Gates at their ends, as at the end of learning. A head's two sequences may differ."""
    skip_if_refused(torch.bfloat16, 128)
    gate = torch.tensor([[0.0, 1.0, 0.4, 0.0], [0.0, 1.0, 1.0, 0.3]], device="cuda")
    closed = (True, False, False, False) if knows else None
    check(torch.bfloat16, 1000, 2, 128, TABLES["windowed"], gate=gate, closed=closed)


def test_deterministic_when_torch_is_asked_to_be() -> None:
    skip_if_refused(torch.bfloat16, 128)
    leaves = [
        torch.randn(2, 4096, heads, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 4, 4)
    ]
    upstream = torch.randn_like(leaves[0])
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            out = hybrid_attention(*leaves, window=TABLES["sorted"], backend="flash")
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
