"""SwiGLU in Triton, in fp32 between one load and one store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of a row that a program computes."""


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    gate_up: (..., 2 C), contiguous. The first C columns are the gate.

    Returns (..., C).
    """
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    with torch.cuda.device_of(gate_up):
        swiglu_kernel[_grid(out)](gate_up, out, width, BLOCK=_block(width))
    return out


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and the result of `swiglu` once more.

    gradient: of the result, (..., C), contiguous.
    gate_up: as in `swiglu`.
    """
    d_gate_up = torch.empty_like(gate_up)
    out = torch.empty_like(gradient)
    width = out.shape[-1]
    with torch.cuda.device_of(gate_up):
        swiglu_backward_kernel[_grid(out)](
            gradient, gate_up, d_gate_up, out, width, BLOCK=_block(width)
        )
    return d_gate_up, out


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def _grid(out: Tensor) -> tuple[int, int]:
    width = out.shape[-1]
    return out.numel() // width, triton.cdiv(width, _block(width))


@triton.jit
def swiglu_kernel(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_ptr = gate_up_ptr + row * 2 * width + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    d_gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    gate_place = row * 2 * width + column
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_place + width, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(gate)
    silu = gate * open_share
    tl.store(out_ptr + place, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)
    d_gate = gradient * up * (open_share + silu * (1.0 - open_share))
    d_up = gradient * silu
    kind = d_gate_up_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + gate_place, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up_ptr + gate_place + width, d_up.to(kind), mask=inside)
