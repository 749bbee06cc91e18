"""Forward pass for Hopper in Gluon: `forward_kernel` of triton/forward.py, scheduled by hand.

Matrix products run while the softmax is computed. docs/kernels.md lists the differences.
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

from megaconsa.kernels.attention.hopper.instructions import block_barrier, load_tile, store_tile
from megaconsa.kernels.attention.triton.schedule import tile_of_program


@gluon.jit
def _softmax(
    scores, total, highest, first, lower, upper, scale,
    BLOCK_N: gl.constexpr, layout: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """One step of the online softmax.

    MASKED: query i sees key j iff lower[i] <= j < upper[i]. Otherwise every query sees every key.

    Returns the weights, their new row sums, the new maximum, and the factor by which the sums
    from before shrink.
    """
    if MASKED:
        keys = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        seen = (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_highest[:, None])
    shrink = gl.exp2(highest - new_highest)
    return weights, total * shrink + gl.sum(weights, 1), new_highest, shrink


@gluon.jit
def _load(desc, tiles, ready, row, head, first, slot, wanted):
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes, pred=wanted)
    load_tile(desc, [row, head, first, 0], ready.index(slot), tiles.index(slot), pred=wanted)


@gluon.jit
def _weigh(
    acc,
    scores,
    total,
    highest,
    v_tiles,
    v_ready,
    count,
    first,
    lower,
    upper,
    scale,
    layouts: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Compute the softmax of a block's scores, and start the product of weights and values."""
    score_layout: gl.constexpr = layouts[0]
    acc_layout: gl.constexpr = layouts[1]
    BLOCK_N: gl.constexpr = scores.shape[1]
    BLOCK_D: gl.constexpr = acc.shape[1]
    weights, total, highest, shrink = _softmax(
        scores, total, highest, first, lower, upper, scale, BLOCK_N, score_layout, MASKED
    )
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    operand = gl.convert_layout(weights.to(v_tiles.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    mbarrier.wait(v_ready.index(count % 2), count // 2 & 1)
    value = v_tiles.index(count % 2).reshape([BLOCK_N, BLOCK_D])
    return warpgroup_mma(operand, value, acc, is_async=True), total, highest


@gluon.jit
def _steps(
    acc, scores, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
    row, head, done, begin, from_block, until_block, blocks, lower, upper, scale,
    layouts: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Process the blocks [from_block, until_block).

    The scores of a block exist when its step begins. Each step computes those of the next block.
    """
    BLOCK_M: gl.constexpr = scores.shape[0]
    BLOCK_N: gl.constexpr = scores.shape[1]
    BLOCK_D: gl.constexpr = acc.shape[1]
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layouts[0])
    for block in range(from_block, until_block):
        count = done + block
        following = (count + 1) % 2
        # After the barrier every warp has finished with this block's keys and the previous block's
        # values, so the loads below may overwrite them.
        block_barrier()
        _load(
            k_desc,
            k_tiles,
            k_ready,
            row,
            head,
            begin + (block + 2) * BLOCK_N,
            count % 2,
            block + 2 < blocks,
        )
        _load(v_desc, v_tiles, v_ready, row, head, begin + (block + 1) * BLOCK_N, following, True)
        mbarrier.wait(k_ready.index(following), (count + 1) // 2 & 1)
        key = k_tiles.index(following).reshape([BLOCK_N, BLOCK_D])
        scores_started = warpgroup_mma(
            query, key.permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        acc_started, total, highest = _weigh(
            acc, scores, total, highest, v_tiles, v_ready, count, begin + block * BLOCK_N,
            lower, upper, scale, layouts, MASKED
        )  # fmt: skip
        scores, acc = warpgroup_mma_wait(0, deps=[scores_started, acc_started])
    return acc, scores, total, highest


@gluon.jit
def _walk(
    acc, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
    row, head, done, begin, stop, lower, upper,
    all_from, all_until, scale, BLOCK_N: gl.constexpr, layouts: gl.constexpr,
):  # fmt: skip
    """Attention over the key blocks in [begin, stop), of which there is at least one.

    Query i sees key j iff lower[i] <= j < upper[i]. Every query sees all keys in
    [all_from, all_until). Blocks with and without a mask have separate loops, because at a branch
    the compiler waits for the running products.

    done: number of blocks that went through the two slots before this walk.
    """
    BLOCK_M: gl.constexpr = query.shape[0]
    BLOCK_D: gl.constexpr = query.shape[1]
    blocks = gl.cdiv(stop - begin, BLOCK_N)
    block_barrier()
    _load(k_desc, k_tiles, k_ready, row, head, begin, done % 2, True)
    _load(v_desc, v_tiles, v_ready, row, head, begin, done % 2, True)
    _load(k_desc, k_tiles, k_ready, row, head, begin + BLOCK_N, (done + 1) % 2, blocks > 1)
    mbarrier.wait(k_ready.index(done % 2), done // 2 & 1)
    key = k_tiles.index(done % 2).reshape([BLOCK_N, BLOCK_D])
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layouts[0])
    scores_started = warpgroup_mma(
        query, key.permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=[scores_started])

    final = blocks - 1
    free = gl.minimum(gl.cdiv(all_from - begin, BLOCK_N), final)
    straddling = gl.minimum(gl.maximum((all_until - begin) // BLOCK_N, free), final)
    acc, scores, total, highest = _steps(
        acc, scores, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
        row, head, done, begin, 0, free, blocks, lower, upper, scale, layouts, True,
    )  # fmt: skip
    acc, scores, total, highest = _steps(
        acc, scores, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
        row, head, done, begin, free, straddling, blocks, lower, upper, scale, layouts, False,
    )  # fmt: skip
    acc, scores, total, highest = _steps(
        acc, scores, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
        row, head, done, begin, straddling, final, blocks, lower, upper, scale, layouts, True,
    )  # fmt: skip
    acc_started, total, highest = _weigh(
        acc, scores, total, highest, v_tiles, v_ready, done + final, begin + final * BLOCK_N,
        lower, upper, scale, layouts, True
    )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc_started])
    return acc, total, highest, done + blocks


@gluon.jit(do_not_specialize=["batch", "length", "kv_heads", "tiles", "section"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, difference_desc, difference_unit, lse, lse_full,
    gates, windows, starts, order,
    batch, length, padded, kv_heads, tiles, section, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GATED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one query head, computed by two warpgroups.

    The arguments are those of `forward_kernel` in triton/forward.py.
    """
    dtype: gl.constexpr = q_desc.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    layouts: gl.constexpr = (score_layout, acc_layout)
    query_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    tile, row, kv_head, member = tile_of_program(
        gl.program_id(0), order, batch, kv_heads, tiles, section, GROUP
    )
    head = kv_head * GROUP + member
    first = (tiles - 1 - tile) * BLOCK_M
    last = gl.minimum(first + BLOCK_M, length) - 1
    queries = first + gl.arange(0, BLOCK_M, query_layout)
    inside = queries < length

    window = gl.load(windows + kv_head)
    gate = 1.0
    between = False
    if GATED:
        gate = gl.load(gates + row * kv_heads + kv_head)
        window = gl.where(gate >= 1.0, length, window)
        between = (gate > 0.0) & (gate < 1.0)

    lower = gl.maximum(queries - window + 1, 0)
    lowest = gl.maximum(first - window + 1, 0)
    lower_of_last = gl.maximum(last - window + 1, 0)
    start_of_first = 0
    start_of_last = 0
    start = gl.full([BLOCK_M], 0, gl.int32, query_layout)
    if PACKED:
        row_starts = starts + row.to(gl.int64) * length
        start = gl.load(row_starts + queries, mask=inside, other=0)
        start_of_first = gl.load(row_starts + first)
        start_of_last = gl.load(row_starts + last)
        lower = gl.maximum(lower, start)
        lowest = gl.maximum(lowest, start_of_first)
        lower_of_last = gl.maximum(lower_of_last, start_of_last)

    q_tile = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(2):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
    fence_async_shared()
    block_barrier()
    mbarrier.expect(q_ready, q_desc.block_type.nbytes)
    load_tile(q_desc, [row, head, first, 0], q_ready, q_tile)
    mbarrier.wait(q_ready, 0)
    query = q_tile.reshape([BLOCK_M, BLOCK_D])

    acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, acc_layout)
    total = gl.full([BLOCK_M], 0.0, gl.float32, query_layout)
    highest = gl.full([BLOCK_M], -1e30, gl.float32, query_layout)
    acc, total, highest, done = _walk(
        acc, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
        row, kv_head, 0, lowest // BLOCK_N * BLOCK_N, last + 1, lower, queries + 1,
        lower_of_last, first + 1, scale, BLOCK_N, layouts,
    )  # fmt: skip
    statistics = (row.to(gl.int64) * kv_heads * GROUP + head) * padded + queries
    gl.store(lse + statistics, gl.where(inside, highest + gl.log2(total), 0.0))
    result = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))[:, None]

    if GATED:
        if between:
            wide_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
                [BLOCK_M, BLOCK_D], gl.float32
            )
            windowed_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_D], wide_layout)
            windowed_tile.store(result)
            begin = start_of_first // BLOCK_N * BLOCK_N
            if begin < lower_of_last:
                acc, total, highest, done = _walk(
                    acc, total, highest, query, k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready,
                    row, kv_head, done, begin, lower_of_last, start, lower,
                    start_of_last, lowest, scale, BLOCK_N, layouts,
                )  # fmt: skip
            gl.store(lse_full + statistics, gl.where(inside, highest + gl.log2(total), 0.0))
            windowed = windowed_tile.load(acc_layout)
            change = (
                acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))[:, None]
                - windowed
            )
            # `in_fixed_point` of triton/forward.py, in Gluon.
            unit = gl.max(gl.abs(change), 1) * (1.0 / 32767.0) + gl.sum(change, 1) * 0.0
            whole = gl.floor(change / gl.where(unit == 0.0, 1.0, unit)[:, None] + 0.5).to(gl.int16)
            rows = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, acc_layout))
            units = difference_unit + (row.to(gl.int64) * kv_heads * GROUP + head) * padded
            gl.store(units + rows, gl.where(rows < length, unit, 0.0))
            block_barrier()
            query.store(whole.to(dtype, bitcast=True))
            fence_async_shared()
            block_barrier()
            store_tile(difference_desc, [row, head, first, 0], q_tile)
            tma.store_wait(0)
            result = windowed + gate * change
        # A NaN gate is in no range above, and must not count as 0: this adds 0 or NaN.
        result += gate - gate
    block_barrier()
    query.store(result.to(dtype))
    fence_async_shared()
    block_barrier()
    store_tile(out_desc, [row, head, first, 0], q_tile)
    tma.store_wait(0)
    # The barriers live until here, so that the compiler gives their memory to nothing else. A GPU
    # that several processes share restores the 8 bytes of every valid barrier when it returns to a
    # program, whatever those bytes hold by then.
    mbarrier.invalidate(q_ready)
    for slot in gl.static_range(2):
        mbarrier.invalidate(k_ready.index(slot))
        mbarrier.invalidate(v_ready.index(slot))
