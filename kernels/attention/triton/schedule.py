"""Which tile a program works on: heads that fit the L2 cache together, heavy tiles first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(pid, order, batch, kv_heads, tiles, section, PER_HEAD: tl.constexpr):
    """Program `pid` -> (position of its tile from the heaviest on, batch row, KV head, member of the head's group).

    The (row, head) pairs are cut into sections of `section` pairs whose data the L2 cache holds; inside a section tiles go from
    heavy to light over all its pairs, so that light tiles fill the end. `order` (batch * kv_heads,) lists row * kv_heads + head, the
    costly pairs first: the last sections are the cheap ones. PER_HEAD programs share a pair's tile (the group's query heads in the
    forward pass).
    """
    section_index = pid // (section * PER_HEAD * tiles)
    within = pid % (section * PER_HEAD * tiles)
    first = section_index * section
    width = tl.minimum(section, batch * kv_heads - first) * PER_HEAD
    pair = tl.load(order + first + within % width // PER_HEAD)
    return within // width, pair // kv_heads, pair % kv_heads, within % PER_HEAD


@triton.jit(do_not_specialize=["pairs", "kv_heads", "length"])
def order_kernel(gates, windows, order, pairs, kv_heads, length, BLOCK: tl.constexpr):
    """Pairs that visit every key (a wide window, or a gate above 0) first, each kind in its own order. One program."""
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
    """(row, head) pairs whose data take at most half of the L2 cache; at least one."""
    return max(1, min(pairs, cache_bytes // 2 // bytes_per_pair))
