"""A norm on a GPU, where no block has fused it with what stands around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaconsa.kernels.norm import triton as norm
from megaconsa.model.weight_gradients import add_gradient


def run_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `RMSNorm.forward`."""
    out: Tensor = _Norm.apply(x, weight, eps)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.eps = eps
        return norm.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        d_x, parts, _ = norm.rms_norm_backward(gradient.contiguous(), x, ctx.weight, ctx.eps)
        return d_x, add_gradient(ctx.weight, parts.sum(dim=0)), None
