"""Norm, SwiGLU and the heads of a projection, with their gradients, compared with fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.kernels import limits
from megaconsa.kernels.norm import triton as norm
from megaconsa.kernels.rotary import normed_heads as heads
from megaconsa.kernels.swiglu import triton as swiglu
from megaconsa.model.rope import rotary_angles

EPS = 1e-5
WHERE = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(
            "cpu",
            torch.float32,
            marks=pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
        ),
        *(
            pytest.param(
                "cuda",
                dtype,
                marks=[
                    pytest.mark.gpu,
                    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
                ],
            )
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
    ids=str,
)


class Draw:
    """Draws tensors for a device and precision."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)


def truth_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


def check(ours: Tensor, truth: Tensor) -> None:
    """A result may be wrong by a rounding, and sums by those of their terms."""
    step = 2e-6 if ours.dtype == torch.float32 else 2 * torch.finfo(ours.dtype).eps
    assert ours.shape == truth.shape
    error = (ours.double() - truth).abs().max()
    assert error <= step * truth.abs().max()


@WHERE
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 24), (33, 512), (3, 1025), (700, 1024)])
def test_norm(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    draw = Draw(device, dtype, rows * width)
    x, delta, gradient, residual = (draw(1, rows, width) for _ in range(4))
    weight = draw(width)
    total, added = norm.add_rms_norm(x, delta, weight, EPS)
    check(total, x.double() + delta.double())
    true_x, true_weight = truth_of(total, weight)
    out = torch.nn.functional.rms_norm(true_x, (width,), true_weight, EPS)
    check(added, out.detach())
    assert torch.equal(norm.rms_norm(total, weight, EPS), added)
    objective = (out * gradient.double()).sum() + (true_x * residual.double()).sum()
    d_x, d_weight = torch.autograd.grad(objective, (true_x, true_weight))
    ours, parts, again = norm.rms_norm_backward(gradient, total, weight, EPS, residual)
    check(ours, d_x)
    check(parts.sum(dim=0), d_weight)
    assert torch.equal(again, added)


@WHERE
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 24), (3, 1024), (70, 3072)])
def test_swiglu(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    draw = Draw(device, dtype, rows * width)
    gate_up = 3 * draw(rows, 2 * width)
    gradient = draw(rows, width)
    (true,) = truth_of(gate_up)
    gate, up = true.chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    (d_gate_up,) = torch.autograd.grad(out, true, gradient.double())
    check(swiglu.swiglu(gate_up), out.detach())
    ours, again = swiglu.swiglu_backward(gradient, gate_up)
    check(ours, d_gate_up)
    assert torch.equal(again, swiglu.swiglu(gate_up))


@WHERE
@pytest.mark.parametrize(
    ("tokens", "queries", "kv_heads", "dim"),
    [(1, 1, 1, 2), (5, 6, 2, 12), (40, 4, 2, 80), (150, 16, 8, 128)],
)
def test_normed_heads(
    tokens: int, queries: int, kv_heads: int, dim: int, device: str, dtype: torch.dtype
) -> None:
    draw = Draw(device, dtype, tokens * dim)
    rows = draw(2, tokens, queries + 2 * kv_heads, dim)
    q_weight, k_weight = draw(dim), draw(dim)
    positions = torch.arange(tokens, device=device).expand(2, -1)
    cos, sin = rotary_angles(positions, dim, 10_000.0)
    true_rows, true_q, true_k = truth_of(rows, q_weight, k_weight)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = torch.nn.functional.rms_norm(x, (dim,), weight, EPS)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    q = turned(true_rows[:, :, :queries], true_q)
    k = turned(true_rows[:, :, queries : queries + kv_heads], true_k)
    ours = heads.normed_heads(rows, queries, q_weight, k_weight, EPS, cos, sin)
    check(ours[0], q.detach())
    check(ours[1], k.detach())
    d_q, d_k, d_v = draw(*q.shape), draw(*k.shape), draw(*k.shape)
    v = true_rows[:, :, queries + kv_heads :]
    d_rows, d_q_weight, d_k_weight = torch.autograd.grad(
        (q, k, v), (true_rows, true_q, true_k), (d_q.double(), d_k.double(), d_v.double())
    )
    found, parts = heads.normed_heads_backward(
        d_q, d_k, d_v, rows, q_weight, k_weight, EPS, cos, sin
    )
    check(found, d_rows)
    check(parts.sum(dim=0)[0], d_q_weight)
    check(parts.sum(dim=0)[1], d_k_weight)
