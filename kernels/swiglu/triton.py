"""SwiGLU in Triton, in fp32 between one load and one store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Elements of the result that a program computes: a part of a row, or several short rows."""


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    gate_up: (..., 2 C), contiguous. The first C columns are the gate.

    Returns (..., C).
    """
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    grid, rows, tile = _tiles(out)
    with torch.cuda.device_of(gate_up):
        swiglu_kernel[grid](gate_up, out, rows, out.shape[-1], **tile)
    return out


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and the result of `swiglu` once more.

    gradient: of the result, (..., C), contiguous.
    gate_up: as in `swiglu`.
    """
    d_gate_up = torch.empty_like(gate_up)
    out = torch.empty_like(gradient)
    grid, rows, tile = _tiles(out)
    with torch.cuda.device_of(gate_up):
        swiglu_backward_kernel[grid](gradient, gate_up, d_gate_up, out, rows, out.shape[-1], **tile)
    return d_gate_up, out


def _tiles(out: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The programs, the number of rows, and the sizes of a tile."""
    width = out.shape[-1]
    rows = out.numel() // width
    columns_of_tile = min(TILE, triton.next_power_of_2(width))
    rows_of_tile = TILE // columns_of_tile
    grid = triton.cdiv(rows, rows_of_tile), triton.cdiv(width, columns_of_tile)
    return grid, rows, {"ROWS": rows_of_tile, "COLUMNS": columns_of_tile}


@triton.jit
def swiglu_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    place, gate_place, inside = _places(rows, width, ROWS, COLUMNS)
    gate = tl.load(gate_up_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_place + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    d_gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    place, gate_place, inside = _places(rows, width, ROWS, COLUMNS)
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


@triton.jit
def _places(
    rows: tl.tensor, width: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where this program's tile is in the result and in the gates, and what of it exists."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * width + column[None]
    gate_place = row[:, None] * 2 * width + column[None]
    return place, gate_place, (row < rows)[:, None] & (column < width)[None]
