"""Backward pass in Triton, with five matrix products per tile for one or both softmaxes of a head.

A program holds one tile of keys and sums dk and dv in registers. dq is summed in memory, in fixed
point, so that every order of the sum gives the same bits. docs/kernels.md derives the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from megaconsa.kernels.attention.triton.forward import from_fixed_point
from megaconsa.kernels.attention.triton.schedule import tile_of_program


@triton.jit(do_not_specialize=["length", "kv_heads"])
def bound_kernel(
    k, v, bounds, length, kv_heads, k_row, k_token, k_head, v_row, v_token, v_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest |k_jd| and the largest |v_j|^2 of BLOCKS * BLOCK_N tokens of one head.

    length: keys of a sequence.
    bounds: fp32 (B * kv_heads, 2, parts).
    """
    parts = tl.cdiv(length, BLOCK_N * BLOCKS)
    line, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row, head = (line // kv_heads).to(tl.int64), (line % kv_heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    largest_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    largest_value = tl.zeros([BLOCK_N], tl.float32)
    for block in range(BLOCKS):
        tokens = (part * BLOCKS + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (tokens < length)[:, None] & (columns[None, :] < HEAD_DIM)
        wide = tokens[:, None].to(tl.int64)
        key = tl.load(
            k + row * k_row + head * k_head + wide * k_token + columns[None, :],
            mask=valid,
            other=0.0,
        ).to(tl.float32)
        value = tl.load(
            v + row * v_row + head * v_head + wide * v_token + columns[None, :],
            mask=valid,
            other=0.0,
        ).to(tl.float32)
        largest_key = tl.maximum(largest_key, tl.abs(key), propagate_nan=tl.PropagateNan.ALL)
        largest_value = tl.maximum(
            largest_value, tl.sum(value * value, 1), propagate_nan=tl.PropagateNan.ALL
        )
    # 0, or NaN where a value is NaN: a maximum over lanes drops NaN, a sum keeps it.
    spoiled = tl.sum(tl.sum(largest_key, 1) + largest_value, 0) * 0.0
    tl.store(bounds + (line * 2) * parts + part, tl.max(tl.max(largest_key, 1), 0) + spoiled)
    tl.store(bounds + (line * 2 + 1) * parts + part, tl.max(largest_value, 0) + spoiled)


@triton.jit(do_not_specialize=["length", "kv_heads"])
def prepare_kernel(
    out, difference, difference_unit, d_out, lse, lse_full, largest, gates,
    statistics, d_gate, d_query_units,
    length, padded, kv_heads, d_out_row, d_out_token, d_out_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, UNIT_BITS: tl.constexpr,
):  # fmt: skip
    """Each query's statistics, zeros in the sum of dq, and each tile's part of the gate's gradient.

    docs/kernels.md derives the statistics.

    largest: fp32 (B, kv_heads), max_j |v_j| times the largest |k_jd| of the head.
    statistics: fp32 (B * heads, ROWS, padded). The rows are lse, centre, 1 / unit of dq, and one
        unused. A score s of the query gets the weight w = exp2(s - lse) and the gradient
        w (dP - centre). With gates ROWS is 8. For a gate inside (0, 1), rows 4 and 5 are lse and
        centre for the keys before the window.
    d_gate: fp32 (B * heads, padded / BLOCK_M).
    d_query_units: (B * heads, padded, BLOCK_D).
    """
    tiles = padded // BLOCK_M
    tile, line = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    heads = kv_heads * GROUP
    row, head = line // heads, line % heads
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    valid = (queries < length)[:, None] & (columns[None, :] < HEAD_DIM)
    offsets = (
        (row.to(tl.int64) * length * heads + head) * HEAD_DIM
        + queries[:, None].to(tl.int64) * (heads * HEAD_DIM)
        + columns[None, :]
    )
    upstream_offsets = row.to(tl.int64) * d_out_row + head.to(tl.int64) * d_out_head
    upstream_offsets += queries[:, None].to(tl.int64) * d_out_token + columns[None, :]
    upstream = tl.load(d_out + upstream_offsets, mask=valid, other=0.0).to(tl.float32)
    product = tl.sum(upstream * tl.load(out + offsets, mask=valid, other=0.0).to(tl.float32), 1)

    units = (
        d_query_units
        + line.to(tl.int64) * padded * BLOCK_D
        + queries[:, None].to(tl.int64) * BLOCK_D
        + columns[None, :]
    )
    tl.store(units, tl.zeros([BLOCK_M, BLOCK_D], d_query_units.dtype.element_ty))
    bound = (
        2.0
        * tl.sqrt(tl.sum(upstream * upstream, 1))
        * tl.load(largest + row * kv_heads + head // GROUP)
    )
    bound += product - product  # 0, or NaN where q or k is not finite
    # A floor keeps 1 / unit finite. Gradients far below it are lost. The comparison lets NaN
    # through: a NaN bound then makes the whole row of dq NaN.
    floor: tl.constexpr = 1e-18 if UNIT_BITS > 32 else 1e-28
    bound = tl.where(bound < floor, floor, bound)
    mine = statistics + line.to(tl.int64) * ROWS * padded + queries
    tl.store(mine + 2 * padded, (2.0**UNIT_BITS) / bound)

    own_lse = tl.load(lse + line.to(tl.int64) * padded + queries)
    if GATED:
        gate = tl.load(gates + row * kv_heads + head // GROUP)
        part = gate - gate  # 0, or NaN
        if (gate > 0.0) & (gate < 1.0):
            change_unit = tl.load(
                difference_unit + line.to(tl.int64) * padded + queries,
                mask=queries < length,
                other=0.0,
            )
            change = from_fixed_point(
                tl.load(difference + offsets, mask=valid, other=0.0), change_unit
            )
            product_change = tl.sum(upstream * change, 1)
            part = tl.sum(product_change, 0)
            full_lse = tl.load(lse_full + line.to(tl.int64) * padded + queries)
            full_product = product + (1.0 - gate) * product_change
            tl.store(mine + 4 * padded, full_lse - tl.math.log2(gate))
            tl.store(mine + 5 * padded, full_product)
            through_full = gate * tl.math.exp2(tl.minimum(own_lse - full_lse, 0.0))
            weight = through_full + (1.0 - gate)
            product = (
                through_full * full_product + (1.0 - gate) * (product - gate * product_change)
            ) / weight
            own_lse -= tl.math.log2(weight)
        tl.store(d_gate + line * tiles + tile, part)
    tl.store(mine, own_lse)
    tl.store(mine + padded, product)


@triton.jit(do_not_specialize=["batch", "length", "kv_heads", "tiles", "section", "earlier_keys"])
def backward_kernel(
    q_desc, k_desc, v_desc, d_out_desc, d_query_units, d_key_out, d_value_out,
    statistics, gates, windows, ends, order,
    batch, length, padded, kv_heads, tiles, section, scale, natural_scale, earlier_keys,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N keys of one KV head.

    ends: int32 (B, S), the end (exclusive) of each token's document.
    length: keys of a sequence, S.
    padded: queries of a sequence, or more.
    earlier_keys: keys before the first query.
    """
    tile, row, kv_head, _ = tile_of_program(
        tl.program_id(0), order, batch, kv_heads, tiles, section, 1
    )
    first = tile * BLOCK_N
    last = tl.minimum(first + BLOCK_N, length) - 1
    keys = first + tl.arange(0, BLOCK_N)
    heads = kv_heads * GROUP

    window = tl.load(windows + kv_head)
    gate = 1.0
    between = False
    if GATED:
        gate = tl.load(gates + row * kv_heads + kv_head)
        window = tl.where(gate >= 1.0, length, window)
        between = (gate > 0.0) & (gate < 1.0)

    # Queries from a key's place to `upper` (exclusive) see it inside their window. Queries from
    # there to `end` (exclusive) see it before their window.
    end_of_first = length
    end_of_last = length
    end = tl.full([BLOCK_N], length, tl.int32)
    if PACKED:
        row_ends = ends + row.to(tl.int64) * length
        end = tl.load(row_ends + keys, mask=keys < length, other=length)
        end_of_first = tl.load(row_ends + first)
        end_of_last = tl.load(row_ends + last)
    # Written so because keys + window may exceed the largest int32.
    upper = keys + tl.minimum(window, end - keys)
    upper_of_first = first + tl.minimum(window, end_of_first - first)
    upper_of_last = last + tl.minimum(window, end_of_last - last)

    # With a gate inside (0, 1) a query sees every key before it, inside the window or before it.
    bound, bound_of_first, stop = upper, upper_of_first, upper_of_last
    if between:
        bound, bound_of_first, stop = end, end_of_first, end_of_last

    key = k_desc.load([row, kv_head, first, 0]).reshape(BLOCK_N, BLOCK_D)
    value = v_desc.load([row, kv_head, first, 0]).reshape(BLOCK_N, BLOCK_D)
    d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = tl.maximum(first - earlier_keys, 0) // BLOCK_M * BLOCK_M

    for member in range(GROUP):
        head = kv_head * GROUP + member
        line = (row * heads + head).to(tl.int64)
        units = d_query_units + line * padded * BLOCK_D
        for start in tl.range(begin, stop - earlier_keys, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            start_place = earlier_keys + start
            places = earlier_keys + queries
            mine = statistics + line * ROWS * padded + queries
            query = q_desc.load([row, head, start, 0]).reshape(BLOCK_M, BLOCK_D)
            upstream = d_out_desc.load([row, head, start, 0]).reshape(BLOCK_M, BLOCK_D)
            scores = tl.dot(key, query.T, input_precision="ieee") * scale
            d_weights = tl.dot(value, upstream.T, input_precision="ieee")
            lse = tl.broadcast_to(tl.load(mine)[None, :], [BLOCK_N, BLOCK_M])
            centre = tl.broadcast_to(tl.load(mine + padded)[None, :], [BLOCK_N, BLOCK_M])
            if between:
                windowed = places[None, :] < upper[:, None]
                lse = tl.where(windowed, lse, tl.load(mine + 4 * padded)[None, :])
                centre = tl.where(windowed, centre, tl.load(mine + 5 * padded)[None, :])
            weights = tl.math.exp2(scores - lse)
            if (start_place < first + BLOCK_N) | (start_place + BLOCK_M > bound_of_first):
                seen = (places[None, :] >= keys[:, None]) & (places[None, :] < bound[:, None])
                weights = tl.where(seen, weights, 0.0)
            d_scores = weights * (d_weights - centre)
            # dv += P dO, dk += dS Q, dq += dS^T K. dq is summed in memory, in fixed point.
            # P and dS are (keys, queries) here.
            d_value = tl.dot(weights.to(upstream.dtype), upstream, d_value, input_precision="ieee")
            d_scores = d_scores.to(query.dtype)
            d_key = tl.dot(d_scores, query, d_key, input_precision="ieee")
            d_query = (
                tl.dot(d_scores.T, key, input_precision="ieee")
                * tl.load(mine + 2 * padded)[:, None]
            )
            whole = (
                libdevice.float2int_rn(d_query)
                if NEAREST
                else tl.floor(d_query + 0.5).to(units.dtype.element_ty)
            )
            tl.atomic_add(
                units + queries[:, None].to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :],
                whole,
                sem="relaxed",
            )

    columns = tl.arange(0, BLOCK_D)
    offsets = (row.to(tl.int64) * length * kv_heads + kv_head) * HEAD_DIM
    offsets += keys[:, None].to(tl.int64) * (kv_heads * HEAD_DIM) + columns[None, :]
    stored = (keys[:, None] < length) & (columns[None, :] < HEAD_DIM)
    tl.store(
        d_key_out + offsets, (d_key * natural_scale).to(d_key_out.dtype.element_ty), mask=stored
    )
    tl.store(d_value_out + offsets, d_value.to(d_value_out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["length", "heads"])
def finish_kernel(
    d_query_units, statistics, d_query, length, padded, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    REGISTER_ORDER: tl.constexpr,
):  # fmt: skip
    """dq, (B, S, heads, HEAD_DIM), from its fixed-point sum.

    REGISTER_ORDER: the sum is in the order of `units_in_memory_order` in hopper/backward.py.
    """
    tiles = padded // BLOCK_M
    tile, line = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    source = (
        d_query_units + line.to(tl.int64) * padded * BLOCK_D + tile.to(tl.int64) * BLOCK_M * BLOCK_D
    )
    units = tl.load(source + tl.arange(0, BLOCK_M * BLOCK_D))
    if REGISTER_ORDER:
        units = units.reshape([BLOCK_D // 16, 2, 4, 8, 4, 2, 2]).permute((2, 5, 3, 1, 0, 4, 6))
    per_unit = tl.load(statistics + (line.to(tl.int64) * ROWS + 2) * padded + queries)
    values = units.reshape([BLOCK_M, BLOCK_D]).to(tl.float32) * (scale / per_unit)[:, None]
    row, head = line // heads, line % heads
    offsets = (
        (row.to(tl.int64) * length * heads + head) * HEAD_DIM
        + queries[:, None].to(tl.int64) * (heads * HEAD_DIM)
        + columns[None, :]
    )
    valid = (queries < length)[:, None] & (columns[None, :] < HEAD_DIM)
    tl.store(d_query + offsets, values.to(d_query.dtype.element_ty), mask=valid)
