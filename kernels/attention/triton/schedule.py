"""Which tile a program works on: heads that fit into the L2 cache together, heavy tiles first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(pid, order, batch, kv_heads, tiles, section, PER_HEAD: tl.constexpr):
    """The work of program `pid`: (tile, batch row, KV head, member of the head's group).

    docs/kernels.md explains the schedule.

    tile: counted from the heaviest on.
    order: int32 (batch * kv_heads,), entries row * kv_heads + head, costly pairs first.
    section: (row, head) pairs whose data the L2 cache holds together.
    PER_HEAD: programs per tile of a pair (the group's query heads in the forward pass, else 1).
    """
    section_index = pid // (section * PER_HEAD * tiles)
    within = pid % (section * PER_HEAD * tiles)
    first = section_index * section
    width = tl.minimum(section, batch * kv_heads - first) * PER_HEAD
    pair = tl.load(order + first + within % width // PER_HEAD)
    return within // width, pair // kv_heads, pair % kv_heads, within % PER_HEAD


@triton.jit(do_not_specialize=["pairs", "kv_heads", "length"])
def order_kernel(gates, windows, order, pairs, kv_heads, length, BLOCK: tl.constexpr):
    """List the pairs that visit every key first: those with a wide window, or a gate above 0.

    Pairs of one kind keep their order. Launch one program.
    """
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    gate = tl.load(gates + pair, mask=inside, other=0.0)
    costly = (
        (gate > 0.0) | (tl.load(windows + pair % kv_heads, mask=inside, other=1) >= length)
    ) & inside
    rank = tl.cumsum(costly.to(tl.int32), 0)
    before = pair + 1 - rank
    position = tl.where(costly, rank - 1, tl.sum(costly.to(tl.int32), 0) + before - 1)
    tl.store(order + position, pair, mask=inside)


def section_size(pairs: int, bytes_per_pair: int, cache_bytes: int) -> int:
    """The number of (row, head) pairs whose data take at most half of the L2 cache, at least 1."""
    return max(1, min(pairs, cache_bytes // 2 // bytes_per_pair))
