"""Decoding in Triton: programs share a cache's keys evenly, and a second kernel joins the results.

One program reads one piece of one KV head's cache for all query heads of its group. It writes the
state of the online softmax, in fp32 and not normalised. Heads are cut into pieces by what they hold
now, so full and windowed heads of any length share one launch evenly.
There are no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaconsa.kernels.decode.kv_cache import KVCache
from megaconsa.kernels.limits import DTYPES, HEAD_DIMS, INTERPRETED, LOG2_E

PROGRAMS_PER_PROCESSOR = 4
"""The number of programs that a Hopper multiprocessor holds at a time."""
TILE_BYTES = 16384
"""Bytes of keys, and of values, that a program loads at a time. With two stages a program takes at
most 50 KiB of shared memory."""
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""A number below every score. Not -inf, because -inf minus itself is NaN, where a tile has no
visible key."""


def refusal(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot serve tensors of this device type, precision and head_dim, or None."""
    if device != "cuda" and not INTERPRETED:
        return f"triton needs a CUDA GPU, and the tensors are on {device}"
    if head_dim not in HEAD_DIMS:
        supported = ", ".join(map(str, HEAD_DIMS))
        return f"head_dim is {head_dim}, but must be one of {supported}"
    if dtype not in DTYPES:
        return f"the precision is {dtype}, but must be fp32, fp16 or bf16"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    return None


def attention(q: Tensor, cache: KVCache, scale: float) -> Tensor:
    """Shapes are those of `decode_attention`. Call it only for what `refusal` does not refuse."""
    batch, _, heads, dim = q.shape
    kv_heads = len(cache.windows)
    group = heads // kv_heads
    # Programs of one sequence. kv_heads of them are reserved: cutting each head into pieces rounds
    # up, which adds less than one piece per head.
    filling = triton.cdiv(PROGRAMS_PER_PROCESSOR * _processors(q.device), batch)
    programs = kv_heads + max(kv_heads, filling)
    dim_tile = triton.next_power_of_2(dim)
    shapes = {
        "KV_HEADS": kv_heads,
        "KV_HEADS_TILE": triton.next_power_of_2(kv_heads),
        "GROUP": group,
        "D": dim,
        "D_TILE": dim_tile,
        "BLOCK": min(TILE_BYTES // (dim_tile * q.element_size()), 128),
    }
    partial = q.new_empty(batch * programs, group, dim, dtype=torch.float32)
    maximum, total = q.new_empty(2, batch * programs, group, dtype=torch.float32)
    schedule = (cache.position, cache.start, cache.slots, programs)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        _attend[(batch * programs,)](
            q.contiguous(),
            cache.keys,
            cache.values,
            cache.rows,
            *schedule,
            partial,
            maximum,
            total,
            scale * LOG2_E,
            **shapes,
            GROUP_TILE=max(triton.next_power_of_2(group), 16),  # the least that tl.dot takes
            num_warps=4,
            num_stages=2,
        )
        _combine[(batch * heads,)](
            partial, maximum, total, *schedule, out, **shapes, PIECES=32, num_warps=4
        )
    return out


@lru_cache
def _processors(device: torch.device) -> int:
    """Number of multiprocessors."""
    if device.type != "cuda":
        # The interpreter has none. With two, short caches are split too.
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _schedule(
    position_ptr: tl.tensor,
    start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    programs: tl.tensor,
    sequence: tl.tensor,
    KV_HEADS: tl.constexpr,
    KV_HEADS_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How the programs of a sequence are divided among its KV heads.

    It depends on what the cache holds now and is computed on the device, so that a captured CUDA
    graph stays balanced as sequences grow. All pieces have the same size. It is the smallest that
    never gives more pieces than `programs`, given that rounding up adds less than one per head.

    Returns each KV head's first program, the end (exclusive) of its programs, and the blocks of
    keys per program.
    """
    head = tl.arange(0, KV_HEADS_TILE)
    slots = tl.load(slots_ptr + head, mask=head < KV_HEADS, other=0).to(tl.int32)
    position = tl.load(position_ptr).to(tl.int32)
    start = tl.load(start_ptr + sequence)
    # A ring that has not wrapped around holds padding in its first slots. Whole blocks of it are
    # not read.
    first = tl.where(position <= slots, start, 0) // BLOCK
    blocks = tl.maximum(tl.cdiv(tl.minimum(position, slots), BLOCK) - first, 0)
    size = tl.maximum(tl.cdiv(tl.sum(blocks), programs - KV_HEADS), 1)
    pieces = tl.cdiv(blocks, size)
    ends = tl.cumsum(pieces)
    return ends - pieces, ends, size


@triton.jit(do_not_specialize=["programs"])
def _attend(
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    position_ptr: tl.tensor,
    start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    programs: tl.tensor,
    partial_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    KV_HEADS_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_TILE: tl.constexpr,
) -> None:
    """The softmax's state (maximum, sum, weighted values) over a program's piece of a head's cache.

    scale: factor of the scores, including log2(e).
    partial: weighted values, (B * programs, GROUP, D).
    maximum, total: (B * programs, GROUP).

    Rows of programs that get no piece are not written.
    """
    sequence = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    begins, ends, size = _schedule(
        position_ptr, start_ptr, slots_ptr, programs, sequence, KV_HEADS, KV_HEADS_TILE, BLOCK
    )
    index = tl.arange(0, KV_HEADS_TILE)
    head = tl.sum((ends <= program).to(tl.int32))
    if head >= KV_HEADS:
        return
    piece = program - tl.sum(tl.where(index == head, begins, 0))

    slots = tl.load(slots_ptr + head).to(tl.int32)
    position = tl.load(position_ptr).to(tl.int32)
    start = tl.load(start_ptr + sequence)
    newest = (position - 1) % slots
    first = tl.where(position <= slots, start, 0) // BLOCK + piece * size
    last = tl.minimum(first + size, tl.cdiv(tl.minimum(position, slots), BLOCK))

    member = tl.arange(0, GROUP_TILE)
    dim = tl.arange(0, D_TILE)
    query = (sequence * KV_HEADS + head).to(tl.int64) * GROUP + member
    q = tl.load(
        q_ptr + query[:, None] * D + dim[None, :],
        mask=(member < GROUP)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    offset = tl.load(rows_ptr + sequence * KV_HEADS + head) * D
    maximum = tl.full([GROUP_TILE], LOWEST, tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    acc = tl.zeros([GROUP_TILE, D_TILE], tl.float32)
    for block in tl.range(first, last):
        slot = block * BLOCK + tl.arange(0, BLOCK)
        age = newest - slot
        age = tl.where(age < 0, age + slots, age)  # tokens since the one in the slot was stored
        visible = (slot < slots) & (age < position - start)
        at = offset + slot.to(tl.int64)[:, None] * D + dim[None, :]
        loaded = visible[:, None] & (dim < D)[None, :]
        k = tl.load(keys_ptr + at, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(maximum - higher)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values_ptr + at, mask=loaded, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        maximum = higher

    row = tl.program_id(0).to(tl.int64) * GROUP + member
    tl.store(maximum_ptr + row, maximum, mask=member < GROUP)
    tl.store(total_ptr + row, total, mask=member < GROUP)
    tl.store(
        partial_ptr + row[:, None] * D + dim[None, :],
        acc,
        mask=(member < GROUP)[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=["programs"])
def _combine(
    partial_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    position_ptr: tl.tensor,
    start_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    programs: tl.tensor,
    out_ptr: tl.tensor,
    KV_HEADS: tl.constexpr,
    KV_HEADS_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Join the states of one query head's pieces, PIECES at a time and in their order."""
    sequence = tl.program_id(0) // (KV_HEADS * GROUP)
    query_head = tl.program_id(0) % (KV_HEADS * GROUP)
    begins, ends, _ = _schedule(
        position_ptr, start_ptr, slots_ptr, programs, sequence, KV_HEADS, KV_HEADS_TILE, BLOCK
    )
    own = tl.arange(0, KV_HEADS_TILE) == query_head // GROUP
    begin = tl.sum(tl.where(own, begins, 0))
    end = tl.sum(tl.where(own, ends, 0))

    dim = tl.arange(0, D_TILE)
    highest = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([D_TILE], tl.float32)
    for base in tl.range(begin, end, PIECES):
        piece = base + tl.arange(0, PIECES)
        row = (sequence * programs + piece).to(tl.int64) * GROUP + query_head % GROUP
        maximum = tl.load(maximum_ptr + row, mask=piece < end, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(maximum, 0))
        weights = tl.exp2(maximum - higher)
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(
            weights * tl.load(total_ptr + row, mask=piece < end, other=0.0), 0
        )
        mask = (piece < end)[:, None] & (dim < D)[None, :]
        partial = tl.load(partial_ptr + row[:, None] * D + dim[None, :], mask=mask, other=0.0)
        acc = acc * fade + tl.sum(weights[:, None] * partial, 0)
        highest = higher
    # No visible key: zeros, as in the reference.
    out = acc / tl.where(total == 0, 1.0, total)
    tl.store(
        out_ptr + tl.program_id(0).to(tl.int64) * D + dim,
        out.to(out_ptr.dtype.element_ty),
        mask=dim < D,
    )
