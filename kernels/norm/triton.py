"""Root mean square norm in Triton. A program holds whole rows, so each is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaconsa.kernels.limits import multiprocessors

TILE = 4096
"""Elements of a tile: one long row, or several short ones."""
PROGRAMS_PER_MULTIPROCESSOR = 8
"""Programs per streaming multiprocessor in the backward pass."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last dimension.

    x: (..., C), contiguous.
    weight: (C,).

    Returns (..., C).
    """
    out = torch.empty_like(x)
    _launch_forward(x, x, x, weight, out, eps, added=False)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + delta, and its norm.

    x, delta: (..., C), contiguous.
    weight: (C,).

    Returns two tensors (..., C).
    """
    total = torch.empty_like(x)
    out = torch.empty_like(x)
    _launch_forward(x, delta, total, weight, out, eps, added=True)
    return total, out


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the norm, and the norm itself once more.

    gradient: of the norm, (..., C), contiguous.
    x: input of the norm, (..., C), contiguous.
    residual: gradient of x from elsewhere, (..., C), contiguous. None: there is none.

    Returns the gradient of x (..., C), partial sums (programs, C) in fp32 of the gradient of
    weight, and the norm (..., C).
    """
    width = x.shape[-1]
    rows = x.numel() // width
    columns = triton.next_power_of_2(width)
    block = max(1, TILE // columns)
    programs = max(
        1, min(triton.cdiv(rows, block), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    )
    d_x = torch.empty_like(x)
    out = torch.empty_like(x)
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            gradient,
            x,
            weight,
            gradient if residual is None else residual,
            d_x,
            out,
            parts,
            rows,
            width,
            eps,
            ADDED=residual is not None,
            ROWS=block,
            COLUMNS=columns,
            num_warps=_warps(columns * block),
        )
    return d_x, parts, out


def _launch_forward(
    x: Tensor, delta: Tensor, total: Tensor, weight: Tensor, out: Tensor, eps: float, *, added: bool
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return
    columns = triton.next_power_of_2(width)
    block = max(1, TILE // columns)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, block),)](
            x,
            delta,
            total,
            weight,
            out,
            rows,
            width,
            eps,
            ADDED=added,
            ROWS=block,
            COLUMNS=columns,
            num_warps=_warps(columns * block),
        )


def _warps(elements: int) -> int:
    """Warps of a program, so that a thread holds 32 elements of a tile."""
    return max(1, min(16, elements // 1024))


@triton.jit
def rms_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    total_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * width + column[None]
    inside = (row < rows)[:, None] & (column < width)[None]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is stored, as the backward pass sees it.
        stored = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, stored, mask=inside)
        x = stored.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps)
    out = x * scale[:, None] * weight[None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    d_x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros([COLUMNS], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        place = row[:, None] * width + column[None]
        inside = (row < rows)[:, None] & (column < width)[None]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps)
        unit = x * scale[:, None]
        tl.store(out_ptr + place, (unit * weight[None]).to(out_ptr.dtype.element_ty), mask=inside)
        d_weight += tl.sum(gradient * unit, axis=0)
        d_unit = gradient * weight[None]
        # The part of the gradient along x changes nothing, because the norm divides it out.
        along = tl.sum(d_unit * unit, axis=1) / width
        d_x = scale[:, None] * (d_unit - unit * along[:, None])
        if ADDED:
            d_x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + place, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(parts_ptr + program * width + column, d_weight, mask=column < width)
