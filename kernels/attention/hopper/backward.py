"""Backward pass for Hopper in Gluon: `backward_kernel` of triton/backward.py, scheduled by hand.

Matrix products start as early as their inputs allow, and are awaited as late as possible.
docs/kernels.md lists the differences.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import libdevice

from megaconsa.kernels.attention.hopper.instructions import add_tile, block_barrier, load_tile
from megaconsa.kernels.attention.triton.schedule import tile_of_program


@gluon.jit
def _start_tile(
    q_desc, d_out_desc, statistics_desc, q_tiles, d_out_tiles, statistics_tiles,
    q_ready, d_out_ready, statistics_ready, row, head, line, start, stage, wanted,
):  # fmt: skip
    """Fetch a tile of queries, of the output's gradient, and of the queries' statistics.

    Each of the three has its own barriers, because the compiler puts a block-wide barrier between
    two operations on the same one.

    line: the row at which this tile's statistics start.
    """
    mbarrier.expect(q_ready.index(stage), q_desc.block_type.nbytes, pred=wanted)
    mbarrier.expect(d_out_ready.index(stage), d_out_desc.block_type.nbytes, pred=wanted)
    mbarrier.expect(statistics_ready.index(stage), statistics_desc.block_type.nbytes, pred=wanted)
    load_tile(
        q_desc, [row, head, start, 0], q_ready.index(stage), q_tiles.index(stage), pred=wanted
    )
    load_tile(
        d_out_desc,
        [row, head, start, 0],
        d_out_ready.index(stage),
        d_out_tiles.index(stage),
        pred=wanted,
    )
    load_tile(
        statistics_desc,
        [line, start],
        statistics_ready.index(stage),
        statistics_tiles.index(stage),
        pred=wanted,
    )


@gluon.jit
def units_in_memory_order(units, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """A (64, BLOCK_D) tile of dq, reordered so that each thread's values are neighbours in memory.

    This is the order in which the matrix units leave the tile in registers. `finish_kernel` of
    triton/backward.py undoes it. It permutes the bits of (query, column).
    """
    gl.static_assert(BLOCK_M == 64)
    blocks: gl.constexpr = BLOCK_D // 16
    split = units.reshape([4, 2, 8, 2, blocks, 4, 2])  # warp, half, lane | warp, block, lane, pair
    return split.permute((4, 3, 0, 2, 5, 1, 6)).reshape([BLOCK_M, BLOCK_D])


@gluon.jit
def _line(row, heads, head, start, beyond, GATED: gl.constexpr):
    """The row of a tile's statistics: those for keys inside the window, or for keys before it."""
    if GATED:
        return (row * heads + head) * 8 + gl.where(start >= beyond, 4, 0)
    else:
        return (row * heads + head) * 4


@gluon.jit
def _next_tile(head, start, begin, stop, BLOCK_M: gl.constexpr):
    """The tile after (head, start): the next queries, or the first ones of the next head."""
    start += BLOCK_M
    past = start >= stop
    return gl.where(past, head + 1, head), gl.where(past, begin, start)


@gluon.jit(do_not_specialize=["batch", "length", "kv_heads", "tiles", "section"])
def hopper_backward_kernel(
    q_desc, k_desc, v_desc, d_out_desc, units_desc, statistics_desc, d_key_out, d_value_out,
    statistics_rows, gates, windows, ends, order,
    batch, length, padded, kv_heads, tiles, section, scale, natural_scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GATED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N keys of one KV head, computed by two warpgroups.

    The arguments are those of `backward_kernel` in triton/backward.py.
    """
    STAGES: gl.constexpr = 3
    ROWS: gl.constexpr = 8 if GATED else 4  # of a query's statistics
    dtype: gl.constexpr = q_desc.dtype
    # Scores and their gradients are (keys, queries): the warpgroups split the keys, and weights
    # feed dv from registers.
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    d_kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    d_q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, d_kv_layout, 2)
    key_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    query_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    d_scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)

    tile, row, kv_head, _ = tile_of_program(
        gl.program_id(0), order, batch, kv_heads, tiles, section, 1
    )
    first = tile * BLOCK_N
    last = gl.minimum(first + BLOCK_N, length) - 1
    keys = first + gl.arange(0, BLOCK_N, key_layout)
    heads = kv_heads * GROUP

    window = gl.load(windows + kv_head)
    gate = 1.0
    between = False
    if GATED:
        gate = gl.load(gates + row * kv_heads + kv_head)
        window = gl.where(gate >= 1.0, length, window)
        between = (gate > 0.0) & (gate < 1.0)

    end_of_first = length
    end_of_last = length
    end = gl.full([BLOCK_N], 0, gl.int32, key_layout) + length
    if PACKED:
        row_ends = ends + row.to(gl.int64) * length
        end = gl.load(row_ends + keys, mask=keys < length, other=length)
        end_of_first = gl.load(row_ends + first)
        end_of_last = gl.load(row_ends + last)
    upper = keys + gl.minimum(window, end - keys)
    upper_of_first = first + gl.minimum(window, end_of_first - first)
    upper_of_last = last + gl.minimum(window, end_of_last - last)

    # Bounds of the widest softmax. A gate inside (0, 1) has two softmaxes, and the wider one is
    # full attention. Otherwise there is only one.
    bound = upper
    bound_of_first = upper_of_first
    stop = upper_of_last
    if GATED:
        if between:
            bound = end
            bound_of_first = end_of_first
            stop = end_of_last

    begin = first // BLOCK_M * BLOCK_M
    # Indices of tiles within a head. From `straddled_from` on, tiles straddle the edge of a key's
    # window. From `beyond_from` on, all tiles are beyond the windows.
    per_head = gl.cdiv(stop - begin, BLOCK_M)
    straddled_from = per_head
    beyond_from = per_head
    if GATED:
        if between:
            straddled_from = gl.maximum((upper_of_first - begin) // BLOCK_M, 0)
            beyond_from = gl.cdiv(upper_of_last - begin, BLOCK_M)
    total = per_head * GROUP
    beyond = begin + beyond_from * BLOCK_M

    k_tile = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    d_out_tiles = gl.allocate_shared_memory(
        dtype, [STAGES] + d_out_desc.block_type.shape, d_out_desc.layout
    )
    statistics_tiles = gl.allocate_shared_memory(
        gl.float32, [STAGES] + statistics_desc.block_type.shape, statistics_desc.layout
    )  # fmt: skip
    d_scores_tiles = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], d_scores_layout)
    units_tile = gl.allocate_shared_memory(gl.int32, units_desc.block_type.shape, units_desc.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    d_out_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    statistics_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(slot), count=1)
        mbarrier.init(d_out_ready.index(slot), count=1)
        mbarrier.init(statistics_ready.index(slot), count=1)
    fence_async_shared()
    block_barrier()

    mbarrier.expect(kv_ready, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    load_tile(k_desc, [row, kv_head, first, 0], kv_ready, k_tile.index(0))
    load_tile(v_desc, [row, kv_head, first, 0], kv_ready, v_tile.index(0))
    # The tile to fetch runs ahead of the tile to work on.
    fetch_head = kv_head * GROUP
    fetch_start = begin
    for slot in gl.static_range(STAGES - 1):
        _start_tile(
            q_desc, d_out_desc, statistics_desc, q_tiles, d_out_tiles, statistics_tiles,
            q_ready, d_out_ready, statistics_ready, row, fetch_head,
            _line(row, heads, fetch_head, fetch_start, beyond, GATED), fetch_start,
            slot, slot < total,
        )  # fmt: skip
        fetch_head, fetch_start = _next_tile(fetch_head, fetch_start, begin, stop, BLOCK_M)
    first_key = k_tile.index(0).reshape([BLOCK_N, BLOCK_D])
    zero_scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, score_layout)
    zero_d_query = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, d_q_layout)
    d_key = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, d_kv_layout)
    d_value = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, d_kv_layout)

    mbarrier.wait(kv_ready, 0)
    mbarrier.wait(q_ready.index(0), 0)
    following = q_tiles.index(0).reshape([BLOCK_M, BLOCK_D])
    scores_next = warpgroup_mma(
        first_key, following.permute((1, 0)), zero_scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=[scores_next])

    # Three kinds of tiles: queries that see the keys inside their window, tiles that straddle the
    # window's edge, and queries beyond it. A straddling tile needs the statistics of both sides.
    # Each kind has a separate loop, so that the other kinds have no branch.
    KINDS: gl.constexpr = 3 if GATED else 1
    i = 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for kind in gl.static_range(KINDS):
            from_tile = 0
            until_tile = straddled_from
            if kind == 1:
                from_tile = straddled_from
                until_tile = beyond_from
            if kind == 2:
                from_tile = beyond_from
                until_tile = per_head
            for tile_of_head in range(from_tile, until_tile):
                start = begin + tile_of_head * BLOCK_M
                stage = i % STAGES
                # Always 0, but the compiler cannot know that. If it did, it would keep the
                # addresses of these tiles in registers, and spill.
                nothing = i >> 30
                key = k_tile.index(nothing).reshape([BLOCK_N, BLOCK_D])
                value = v_tile.index(nothing).reshape([BLOCK_N, BLOCK_D])
                d_scores_tile = d_scores_tiles.index(nothing)
                queries = start + gl.arange(0, BLOCK_M, query_layout)
                # Loaded from memory, not from the tile: Triton 3.6 reads a transposed view of an
                # unswizzled tile wrongly.
                line = ((row * heads + head) * ROWS).to(gl.int64)
                per_unit = gl.load(
                    statistics_rows
                    + (line + 2) * padded
                    + start
                    + gl.arange(0, BLOCK_M, gl.SliceLayout(1, d_q_layout))
                )
                query = q_tiles.index(stage).reshape([BLOCK_M, BLOCK_D])
                upstream = d_out_tiles.index(stage).reshape([BLOCK_M, BLOCK_D])

                mbarrier.wait(d_out_ready.index(stage), i // STAGES & 1)
                d_weights_next = warpgroup_mma(
                    value, upstream.permute((1, 0)), zero_scores, use_acc=False, is_async=True
                )
                mbarrier.wait(statistics_ready.index(stage), i // STAGES & 1)
                statistics = statistics_tiles.index(stage)
                lse = statistics.slice(0, 1).load(score_layout)
                if kind == 1:
                    windowed = queries[None, :] < upper[:, None]
                    lse_before = gl.load(statistics_rows + (line + 4) * padded + queries)
                    weights = gl.exp2(scores * scale - gl.where(windowed, lse, lse_before[None, :]))
                else:
                    weights = gl.exp2(scores * scale - lse)
                # The branch comes after the exponentials, because at a branch the compiler waits
                # for the product that runs beside them.
                if (start < first + BLOCK_N) | (start + BLOCK_M > bound_of_first):
                    seen = (queries[None, :] >= keys[:, None]) & (queries[None, :] < bound[:, None])
                    weights = gl.where(seen, weights, 0.0)
                d_weights = warpgroup_mma_wait(0, deps=[d_weights_next])
                centre = statistics.slice(1, 1).load(score_layout)
                if kind == 1:
                    centre_before = gl.load(statistics_rows + (line + 5) * padded + queries)
                    d_scores = weights * (
                        d_weights - gl.where(windowed, centre, centre_before[None, :])
                    )
                else:
                    d_scores = weights * (d_weights - centre)
                operand = gl.convert_layout(weights.to(dtype), operand_layout)
                d_value = warpgroup_mma(operand, upstream, d_value, is_async=True)

                d_scores = d_scores.to(dtype)
                tma.store_wait(0)
                d_scores_tile.store(d_scores)
                fence_async_shared()
                block_barrier()
                d_key = warpgroup_mma(d_scores_tile, query, d_key, is_async=True)
                d_query_next = warpgroup_mma(
                    d_scores_tile.permute((1, 0)), key, zero_d_query, use_acc=False, is_async=True
                )
                next_stage = (i + 1) % STAGES
                mbarrier.wait(q_ready.index(next_stage), (i + 1) // STAGES & 1, pred=i + 1 < total)
                following = q_tiles.index(next_stage).reshape([BLOCK_M, BLOCK_D])
                scores_next = warpgroup_mma(
                    key, following.permute((1, 0)), zero_scores, use_acc=False, is_async=True
                )
                # All warps have finished with the previous tile. The tile after the next one takes
                # its place.
                _start_tile(
                    q_desc, d_out_desc, statistics_desc, q_tiles, d_out_tiles, statistics_tiles,
                    q_ready, d_out_ready, statistics_ready, row, fetch_head,
                    _line(row, heads, fetch_head, fetch_start, beyond, GATED), fetch_start,
                    (i + STAGES - 1) % STAGES, i + STAGES - 1 < total,
                )  # fmt: skip
                fetch_head, fetch_start = _next_tile(fetch_head, fetch_start, begin, stop, BLOCK_M)
                d_query, d_key, d_value = warpgroup_mma_wait(1, deps=[d_query_next, d_key, d_value])

                units = libdevice.float2int_rn(d_query * per_unit[:, None])
                units_tile.store(units_in_memory_order(units, BLOCK_M, BLOCK_D))
                fence_async_shared()
                block_barrier()
                add_tile(units_desc, [(row * heads + head) * padded + start, 0], units_tile)
                i += 1
                scores = warpgroup_mma_wait(0, deps=[scores_next])

    tma.store_wait(0)
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, d_kv_layout))
    stored_keys = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, d_kv_layout))
    offsets = (row.to(gl.int64) * length * kv_heads + kv_head) * HEAD_DIM
    offsets += stored_keys[:, None].to(gl.int64) * (kv_heads * HEAD_DIM) + columns[None, :]
    stored = (stored_keys[:, None] < length) & (columns[None, :] < HEAD_DIM)
    gl.store(d_key_out + offsets, (d_key * natural_scale).to(dtype), mask=stored)
    gl.store(d_value_out + offsets, d_value.to(dtype), mask=stored)
    # Keeps the barriers' memory until here, for the reason given in hopper/forward.py.
    block_barrier()
    mbarrier.invalidate(kv_ready)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(q_ready.index(slot))
        mbarrier.invalidate(d_out_ready.index(slot))
        mbarrier.invalidate(statistics_ready.index(slot))
