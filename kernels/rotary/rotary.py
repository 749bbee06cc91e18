"""Rotary position embedding of heads, in one pass on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D / 2]) of x (B, S, heads, D) by the angle of its position, in fp32; returns x's precision.

    cos and sin: (B, S, 1, D / 2), fp32 and contiguous; they get no gradient. Half-split layout of Qwen3 (arXiv 2104.09864).
    """
    if x.is_cuda:
        rotated: Tensor = _Rotation.apply(x, cos, sin)
        return rotated
    return _plain(x, cos, sin)


def _plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from megaconsa.kernels.rotary import triton

        ctx.save_for_backward(cos, sin)
        return triton.rotate(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        from megaconsa.kernels.rotary import triton

        return triton.rotate(gradient, *ctx.saved_tensors, inverse=True), None, None
