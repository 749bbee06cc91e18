"""Rotary position embedding of heads: one pass on a GPU, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D / 2]) by the angle of its token's position, in fp32.

    The layout is the half-split one of Qwen3 (arXiv 2104.09864).

    x: (B, S, heads, D).
    cos, sin: (B, S, 1, D / 2), fp32 and contiguous. They get no gradient.

    Returns a tensor in the precision of x.
    """
    if x.is_cuda:
        rotated: Tensor = _Rotation.apply(x, cos, sin)
        return rotated
    return _plain(x, cos, sin)


def _plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from megaconsa.kernels.rotary import triton

        ctx.save_for_backward(cos, sin)
        return triton.rotate(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        from megaconsa.kernels.rotary import triton

        cos, sin = ctx.saved_tensors
        # The gradient of a rotation is the rotation by the opposite angle.
        return triton.rotate(gradient, cos, sin, inverse=True), None, None
