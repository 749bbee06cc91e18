"""Rotation of heads, forward and backward, compared with complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.kernels import limits
from megaconsa.kernels.rotary import rotary, triton
from megaconsa.model.rope import rotary_angles

SHAPES = pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 6), (8, 64), (5, 128), (16, 80)])


def draw(
    heads: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * dim)
    x = torch.randn(2, 7, heads, dim, generator=generator).to(device, dtype)
    positions = torch.randint(1000, (2, 7), generator=generator).to(device)
    return x, *rotary_angles(positions, dim, 10_000.0)


def truth(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)


def close(ours: Tensor, theirs: Tensor) -> bool:
    step = 1e-6 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    return bool((ours.double() - theirs).abs().max() <= step * theirs.abs().max())


@SHAPES
def test_plain(heads: int, dim: int) -> None:
    x, cos, sin = draw(heads, dim, torch.float32)
    assert close(rotary.rotate(x, cos, sin), truth(x, cos, sin))


@SHAPES
@pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_interpreted(heads: int, dim: int) -> None:
    x, cos, sin = draw(heads, dim, torch.float32)
    assert close(triton.rotate(x, cos, sin, inverse=False), truth(x, cos, sin))
    assert close(triton.rotate(x, cos, sin, inverse=True), truth(x, cos, -sin))


@SHAPES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(heads: int, dim: int, dtype: torch.dtype) -> None:
    x, cos, sin = draw(heads, dim, dtype, "cuda")
    # Not contiguous, as after a transpose.
    leaf = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    out = rotary.rotate(leaf, cos, sin)
    assert close(out.detach(), truth(x, cos, sin))
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, weight)
    assert close(gradient, truth(weight, cos, -sin))
