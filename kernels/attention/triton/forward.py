"""Forward pass in Triton: a window for each KV head, or both softmaxes of a gated head in one pass.

A program holds one tile of queries and walks over the keys. docs/kernels.md explains the method.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megaconsa.kernels.attention.triton.schedule import tile_of_program


@triton.jit
def _walk(
    acc,
    total,
    highest,
    q,
    k_desc,
    v_desc,
    row,
    head,
    start,
    stop,
    lower,
    upper,
    scale,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the key blocks in [start, stop).

    MASKED: query i sees key j iff lower[i] <= j < upper[i]. Otherwise every query sees every key.
    """
    for first in tl.range(start, stop, BLOCK_N):
        k = k_desc.load([row, head, first, 0]).reshape(BLOCK_N, q.shape[1])
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            seen = (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - new_highest[:, None])
        shrink = tl.math.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        v = v_desc.load([row, head, first, 0]).reshape(BLOCK_N, q.shape[1])
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


@triton.jit
def in_fixed_point(values, dtype: tl.constexpr):
    """Rows of fp32 values in 16 bits: a unit per row, and whole multiples of it in bits of `dtype`.

    If `dtype` is fp32, the values stay as they are. Rounding to bf16 would be too coarse for the
    gate's gradient, which is a sum over the whole tensor.
    """
    # The sum adds 0, or NaN where a value is NaN: a maximum drops NaN.
    unit = tl.max(tl.abs(values), 1) * (1.0 / 32767.0) + tl.sum(values, 1) * 0.0
    # The other branch must be under `else`: the compiler does not stop at a `return`.
    if dtype == tl.float32:
        return unit, values
    else:
        whole = tl.floor(values / tl.where(unit == 0.0, 1.0, unit)[:, None] + 0.5).to(tl.int16)
        return unit, whole.to(dtype, bitcast=True)


@triton.jit
def from_fixed_point(kept, unit):
    """The values that `in_fixed_point` kept, in fp32."""
    if kept.dtype == tl.float32:
        return kept
    else:
        return kept.to(tl.int16, bitcast=True).to(tl.float32) * unit[:, None]


@triton.jit(do_not_specialize=["batch", "length", "kv_heads", "tiles", "section", "earlier_keys"])
def forward_kernel(
    q_desc, k_desc, v_desc, out, difference, difference_unit, lse, lse_full,
    gates, windows, starts, order,
    batch, length, padded, kv_heads, tiles, section, scale, earlier_keys,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one query head.

    out: (B, S, heads, HEAD_DIM).
    difference: full minus windowed output, shaped like out, as `in_fixed_point` keeps it. Written
        for gates inside (0, 1) only.
    difference_unit: the unit of each row of difference, fp32 (B, heads, padded). Written for gates
        inside (0, 1) only.
    lse: fp32 (B, heads, padded), base 2, over the keys inside the window (all keys at a gate of 1).
        0 from `length` on.
    lse_full: the same over all keys. Written for gates inside (0, 1) only.
    gates: fp32 (B, kv_heads).
    windows: int32 (kv_heads,), at most S.
    starts: int32 (B, S), the first position of each token's document.
    length: queries of a sequence.
    padded: a multiple of every tile size.
    scale: factor of the scores, including log2(e).
    earlier_keys: tokens before the first query. S is length + earlier_keys.
    """
    tile, row, kv_head, member = tile_of_program(
        tl.program_id(0), order, batch, kv_heads, tiles, section, GROUP
    )
    head = kv_head * GROUP + member
    first = (tiles - 1 - tile) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < length
    # Places in the sequence. Keys are counted from its start.
    first_place = earlier_keys + first
    last_place = earlier_keys + tl.minimum(first + BLOCK_M, length) - 1
    places = earlier_keys + queries

    window = tl.load(windows + kv_head)
    gate = 1.0
    if GATED:
        gate = tl.load(gates + row * kv_heads + kv_head)
        window = tl.where(gate >= 1.0, earlier_keys + length, window)

    lower = tl.maximum(places - window + 1, 0)
    lowest = tl.maximum(first_place - window + 1, 0)
    lower_of_last = tl.maximum(last_place - window + 1, 0)
    start_of_first = 0
    start_of_last = 0
    start = tl.zeros([BLOCK_M], tl.int32)
    if PACKED:
        row_starts = starts + row.to(tl.int64) * (earlier_keys + length)
        start = tl.load(row_starts + places, mask=inside, other=0)
        # A tile of padding starts after the last token: there the first place is the greater one.
        start_of_first = tl.load(row_starts + tl.minimum(first_place, last_place))
        start_of_last = tl.load(row_starts + last_place)
        lower = tl.maximum(lower, start)
        lowest = tl.maximum(lowest, start_of_first)
        lower_of_last = tl.maximum(lower_of_last, start_of_last)

    q = q_desc.load([row, head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)

    # Keys inside the window, in three walks: blocks that straddle the window's lower edge, blocks
    # that every query sees, and the diagonal.
    begin = lowest // BLOCK_N * BLOCK_N
    diagonal = tl.maximum((first_place + 1) // BLOCK_N * BLOCK_N, begin)
    seen_by_all = tl.minimum(tl.cdiv(lower_of_last, BLOCK_N) * BLOCK_N, diagonal)
    acc, total, highest = _walk(
        acc,
        total,
        highest,
        q,
        k_desc,
        v_desc,
        row,
        kv_head,
        begin,
        seen_by_all,
        lower,
        places + 1,
        scale,
        BLOCK_N,
        True,
    )
    acc, total, highest = _walk(
        acc,
        total,
        highest,
        q,
        k_desc,
        v_desc,
        row,
        kv_head,
        seen_by_all,
        diagonal,
        lower,
        places + 1,
        scale,
        BLOCK_N,
        False,
    )
    acc, total, highest = _walk(
        acc,
        total,
        highest,
        q,
        k_desc,
        v_desc,
        row,
        kv_head,
        diagonal,
        last_place + 1,
        lower,
        places + 1,
        scale,
        BLOCK_N,
        True,
    )

    columns = tl.arange(0, BLOCK_D)
    base = (row.to(tl.int64) * length * kv_heads * GROUP + head) * HEAD_DIM
    offsets = (
        base + queries[:, None].to(tl.int64) * (kv_heads * GROUP * HEAD_DIM) + columns[None, :]
    )
    stored = inside[:, None] & (columns[None, :] < HEAD_DIM)
    statistics = (row.to(tl.int64) * kv_heads * GROUP + head) * padded + queries
    tl.store(lse + statistics, tl.where(inside, highest + tl.math.log2(total), 0.0))
    result = acc / total[:, None]

    if GATED:
        if (gate > 0.0) & (gate < 1.0):
            # The windowed output is parked in memory, because in registers it would slow down the
            # loops below. `difference` holds it rounded to 16 bits, `out` holds the remainder.
            rounded = result.to(difference.dtype.element_ty)
            tl.store(difference + offsets, rounded, mask=stored)
            tl.store(
                out + offsets,
                (result - rounded.to(tl.float32)).to(out.dtype.element_ty),
                mask=stored,
            )
            # Keys before the window, in three walks: blocks that straddle a document's start,
            # blocks outside every query's window, and again those that straddle its lower edge.
            begin = start_of_first // BLOCK_N * BLOCK_N
            outside = tl.maximum(lowest // BLOCK_N * BLOCK_N, begin)
            if PACKED:
                seen_by_all = tl.minimum(tl.cdiv(start_of_last, BLOCK_N) * BLOCK_N, outside)
                acc, total, highest = _walk(
                    acc,
                    total,
                    highest,
                    q,
                    k_desc,
                    v_desc,
                    row,
                    kv_head,
                    begin,
                    seen_by_all,
                    start,
                    lower,
                    scale,
                    BLOCK_N,
                    True,
                )
                begin = seen_by_all
            acc, total, highest = _walk(
                acc,
                total,
                highest,
                q,
                k_desc,
                v_desc,
                row,
                kv_head,
                begin,
                outside,
                start,
                lower,
                scale,
                BLOCK_N,
                False,
            )
            acc, total, highest = _walk(
                acc,
                total,
                highest,
                q,
                k_desc,
                v_desc,
                row,
                kv_head,
                outside,
                lower_of_last,
                start,
                lower,
                scale,
                BLOCK_N,
                True,
            )
            tl.store(lse_full + statistics, tl.where(inside, highest + tl.math.log2(total), 0.0))
            # The threads that read the windowed output back need not be those that wrote it.
            tl.debug_barrier()
            windowed = tl.load(difference + offsets, mask=stored, other=0.0).to(tl.float32)
            windowed += tl.load(out + offsets, mask=stored, other=0.0).to(tl.float32)
            change = acc / total[:, None] - windowed
            unit, kept = in_fixed_point(change, difference.dtype.element_ty)
            tl.store(difference_unit + statistics, tl.where(inside, unit, 0.0))
            tl.store(difference + offsets, kept, mask=stored)
            result = windowed + gate * change
        # A NaN gate is in no range above, and must not count as 0: this adds 0 or NaN.
        result += gate - gate
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=stored)
