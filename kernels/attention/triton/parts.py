"""Joins attention to the keys of a window with attention to the keys before it, in Triton.

`flash_gated.py` says what for, and docs/kernels.md derives the formulas. A query at position t sees
keys before its window only if t >= W, so tensors of that attention begin with the query at W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Queries, or keys, that a program takes of one head."""


def join(
    windowed: Tensor, before: Tensor, lse: Tensor, lse_before: Tensor, gate: Tensor, window: int
) -> None:
    """The output of gated heads, and full minus windowed attention.

    windowed: attention to the keys of the window, (B, S, heads, D). Becomes the gated output.
    before: attention to the keys before it, (B, S - W, heads, D). Becomes full minus windowed
        attention. Both are contiguous.
    lse, lse_before: log-sum-exp of both, fp32 (B, heads, S) and (B, heads, S - W). The second
        becomes that of full attention.
    gate: z, fp32 (B, kv_heads). Where it is 0, `before` and `lse_before` are neither read nor
        written.
    window: W.
    """
    batch, late, heads, dim = before.shape
    with torch.cuda.device_of(windowed):
        join_kernel[(triton.cdiv(late, ROWS), batch * heads)](
            windowed,
            before,
            lse,
            lse_before,
            gate.contiguous(),
            windowed.shape[1],
            window,
            heads,
            gate.shape[1],
            DIM=dim,
            COLUMNS=triton.next_power_of_2(dim),
            ROWS=ROWS,
        )


def divide(
    d_out: Tensor,
    out: Tensor,
    difference: Tensor,
    lse: Tensor,
    lse_full: Tensor,
    gate: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward passes of both attentions read, and the gradient of the gate.

    d_out: of the gated output, (B, S, heads, D), contiguous.
    out, difference, lse, lse_full: what `join` made of its arguments.

    Returns

    - the gradient of the windowed attention's output, (B, S, heads, D),
    - an output for it, (B, S, heads, D): its product with that gradient is what a softmax over the
      window subtracts, though the query's other keys took part in the sum,
    - full attention, (B, S - W, heads, D), undefined where the gate is 0,
    - dz, fp32 (B, kv_heads), 0 for gates at exactly 0 or 1.
    """
    batch, length, heads, dim = out.shape
    kv_heads = gate.shape[1]
    d_windowed = torch.empty_like(out)
    windowed = torch.empty_like(out)
    full = torch.empty_like(difference)
    tiles = triton.cdiv(length, ROWS)
    parts = lse.new_empty(batch, kv_heads, heads // kv_heads * tiles)
    with torch.cuda.device_of(out):
        divide_kernel[(tiles, batch * heads)](
            d_out,
            out,
            difference,
            lse,
            lse_full,
            gate.contiguous(),
            d_windowed,
            windowed,
            full,
            parts,
            length,
            window,
            heads,
            kv_heads,
            DIM=dim,
            COLUMNS=triton.next_power_of_2(dim),
            ROWS=ROWS,
        )
    return d_windowed, windowed, full, parts.sum(dim=-1)


def add_gated(total: Tensor, addend: Tensor, gate: Tensor, first: int) -> None:
    """Adds z times a tensor to the tokens of another from `first` on, in place.

    total: (B, S, heads, D), contiguous.
    addend: (B, tokens, heads, D), contiguous. Not read where the gate is 0.
    gate: z, fp32 (B, kv_heads).
    """
    batch, tokens, heads, dim = addend.shape
    with torch.cuda.device_of(total):
        add_gated_kernel[(triton.cdiv(tokens, ROWS), batch * heads)](
            total,
            addend,
            gate.contiguous(),
            total.shape[1],
            tokens,
            first,
            heads,
            gate.shape[1],
            DIM=dim,
            COLUMNS=triton.next_power_of_2(dim),
            ROWS=ROWS,
        )


@triton.jit(do_not_specialize=["length", "window"])
def join_kernel(
    windowed_ptr: tl.tensor,
    before_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    lse_before_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    length: tl.tensor,
    window: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    line = tl.program_id(1).to(tl.int64)
    gate = _gate(gate_ptr, line, heads, kv_heads)
    if gate == 0.0:
        return
    late = length - window
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < late
    place, inside = _places(line, row, late, heads, DIM, COLUMNS)
    windowed_place, _ = _places(line, row + window, length, heads, DIM, COLUMNS)
    windowed = tl.load(windowed_ptr + windowed_place, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + place, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + line * length + row + window, mask=valid, other=0.0)
    lse_before = tl.load(lse_before_ptr + line * late + row, mask=valid, other=0.0)
    # The share of the keys before the window in the sum of full attention's weights.
    share = tl.sigmoid(lse_before - lse)
    difference = (before - windowed) * share[:, None]
    lse_full = lse_before - tl.log(share)
    # With all weight in the window, the logarithm is infinite.
    lse_full = tl.where(share > 0.5, lse_full, lse - tl.log(1.0 - share))
    kind = windowed_ptr.dtype.element_ty
    tl.store(windowed_ptr + windowed_place, (windowed + gate * difference).to(kind), mask=inside)
    tl.store(before_ptr + place, difference.to(kind), mask=inside)
    tl.store(lse_before_ptr + line * late + row, lse_full, mask=valid)


@triton.jit(do_not_specialize=["length", "window"])
def divide_kernel(
    d_out_ptr: tl.tensor,
    out_ptr: tl.tensor,
    difference_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    lse_full_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    d_windowed_ptr: tl.tensor,
    windowed_ptr: tl.tensor,
    full_ptr: tl.tensor,
    part_ptr: tl.tensor,
    length: tl.tensor,
    window: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    line = tl.program_id(1).to(tl.int64)
    gate = _gate(gate_ptr, line, heads, kv_heads)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, inside = _places(line, row, length, heads, DIM, COLUMNS)
    kind = d_out_ptr.dtype.element_ty
    d_out = tl.load(d_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
    part = gate * 0.0
    if gate == 0.0:
        tl.store(d_windowed_ptr + place, d_out.to(kind), mask=inside)
        tl.store(windowed_ptr + place, out.to(kind), mask=inside)
    else:
        late = length - window
        late_row = row - window
        is_late = (late_row >= 0) & (late_row < late)
        late_place, late_inside = _places(line, late_row, late, heads, DIM, COLUMNS)
        late_inside = late_inside & is_late[:, None]
        difference = tl.load(difference_ptr + late_place, mask=late_inside, other=0.0)
        difference = difference.to(tl.float32)
        lse = tl.load(lse_ptr + line * length + row, mask=is_late, other=0.0)
        lse_full = tl.load(lse_full_ptr + line * late + late_row, mask=is_late, other=0.0)
        # The window's share in the sum of full attention's weights: 1 where there is nothing else.
        share = tl.minimum(tl.exp(lse - lse_full), 1.0)
        of_full = gate * share
        of_windowed = 1.0 - gate
        factor = of_full + of_windowed
        # Full attention's weight in the mean of both outputs. The factor is 0 only with a gate at 1
        # and all weight before the window.
        weight = tl.where(factor > 0.0, of_full / factor, 1.0)
        windowed = out - gate * difference
        mean = windowed + weight[:, None] * difference
        tl.store(d_windowed_ptr + place, (factor[:, None] * d_out).to(kind), mask=inside)
        tl.store(windowed_ptr + place, mean.to(kind), mask=inside)
        tl.store(full_ptr + late_place, (windowed + difference).to(kind), mask=late_inside)
        if gate < 1.0:
            part = tl.sum(tl.sum(d_out * difference, 1), 0)
    # Parts of one KV head follow each other.
    tl.store(part_ptr + line * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit(do_not_specialize=["length", "tokens", "first"])
def add_gated_kernel(
    total_ptr: tl.tensor,
    addend_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    length: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    line = tl.program_id(1).to(tl.int64)
    gate = _gate(gate_ptr, line, heads, kv_heads)
    if gate == 0.0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    addend_place, inside = _places(line, row, tokens, heads, DIM, COLUMNS)
    place, _ = _places(line, row + first, length, heads, DIM, COLUMNS)
    total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(addend_ptr + addend_place, mask=inside, other=0.0).to(tl.float32)
    total += gate * addend
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_ptr: tl.tensor, line: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor) -> tl.tensor:
    """z of the sequence and head that a line of (B * heads) stands for."""
    return tl.load(gate_ptr + line * kv_heads // heads)


@triton.jit
def _places(
    line: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where a head's rows are in a tensor (B, rows, heads, DIM), and which elements exist."""
    column = tl.arange(0, COLUMNS)
    token = line // heads * rows + row
    place = (token * heads + line % heads)[:, None] * DIM + column[None]
    return place, (row < rows)[:, None] & (column < DIM)[None]
