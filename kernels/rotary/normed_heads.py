"""Norm and rotary embedding of the queries and keys in a row of projections, in Triton.

A row holds the heads of one token: queries, keys, values. In the forward pass a program takes some
tokens and walks over their heads, so that it loads their angles once. In the backward pass it takes
one head and walks over tokens, so that it adds up the gradient of the norm's weight in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaconsa.kernels.limits import multiprocessors

TILE = 4096
"""Elements of a head's tile: tokens times head_dim."""
PROGRAMS_PER_MULTIPROCESSOR = 32
"""Programs per streaming multiprocessor in the backward pass."""


def normed_heads(
    rows: Tensor,
    heads: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Queries and keys after their norms and their rotation.

    rows: (B, S, heads + 2 kv_heads, D), contiguous.
    heads: query heads.
    q_weight, k_weight: (D,), of the norms.
    cos, sin: fp32, B * S * D / 2 elements, contiguous.

    Returns (B, S, heads, D) and (B, S, kv_heads, D).
    """
    batch, length, total, dim = rows.shape
    kv_heads = (total - heads) // 2
    q = rows.new_empty(batch, length, heads, dim)
    k = rows.new_empty(batch, length, kv_heads, dim)
    tokens = batch * length
    block = _tokens_of_tile(dim)
    with torch.cuda.device_of(rows):
        normed_heads_kernel[(triton.cdiv(tokens, block),)](
            rows,
            q_weight,
            k_weight,
            cos,
            sin,
            q,
            k,
            tokens,
            heads,
            kv_heads,
            eps,
            HALF=dim // 2,
            TOKENS=block,
            HALF_TILE=triton.next_power_of_2(dim // 2),
        )
    return q, k


def normed_heads_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    rows: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of both norms' weights.

    d_q: (B, S, heads, D), contiguous.
    d_k, d_v: (B, S, kv_heads, D), contiguous.

    Returns (B, S, heads + 2 kv_heads, D), and partial sums (programs, 2, D) in fp32.
    """
    batch, length, total, dim = rows.shape
    tokens = batch * length
    block = _tokens_of_tile(dim)
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(rows.device)
    chunks = max(1, min(triton.cdiv(tokens, block), programs // total))
    d_rows = torch.empty_like(rows)
    normed = d_q.shape[2] + d_k.shape[2]
    parts = torch.empty(chunks * normed, 2, dim, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        normed_heads_backward_kernel[(total, chunks)](
            d_q,
            d_k,
            d_v,
            rows,
            q_weight,
            k_weight,
            cos,
            sin,
            d_rows,
            parts,
            tokens,
            d_q.shape[2],
            d_k.shape[2],
            eps,
            HALF=dim // 2,
            TOKENS=block,
            HALF_TILE=triton.next_power_of_2(dim // 2),
        )
    return d_rows, parts


def _tokens_of_tile(dim: int) -> int:
    return max(1, TILE // triton.next_power_of_2(dim))


@triton.jit
def normed_heads_kernel(
    rows_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, HALF_TILE)
    inside = (token < tokens)[:, None] & (pair < HALF)[None]
    angle = token[:, None] * HALF + pair[None]
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    row = token[:, None] * (heads + 2 * kv_heads) * 2 * HALF + pair[None]
    for head in range(heads):
        place = token[:, None] * heads * 2 * HALF + head * 2 * HALF + pair[None]
        x_ptr = rows_ptr + row + head * 2 * HALF
        _turn(x_ptr, q_weight_ptr, q_ptr + place, cos, sin, inside, eps, HALF, HALF_TILE)
    for head in range(kv_heads):
        place = token[:, None] * kv_heads * 2 * HALF + head * 2 * HALF + pair[None]
        x_ptr = rows_ptr + row + (heads + head) * 2 * HALF
        _turn(x_ptr, k_weight_ptr, k_ptr + place, cos, sin, inside, eps, HALF, HALF_TILE)


@triton.jit
def _turn(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
) -> None:
    """Writes the norm of a head, rotated."""
    first_weight, second_weight = _load_weight(weight_ptr, HALF, HALF_TILE)
    first, second = _load_halves(x_ptr, inside, HALF)
    scale = _scale(first, second, HALF, eps)
    first = first * scale * first_weight
    second = second * scale * second_weight
    turned_1 = first * cos - second * sin
    turned_2 = second * cos + first * sin
    _store_halves(out_ptr, turned_1, turned_2, inside, HALF)


@triton.jit
def normed_heads_backward_kernel(
    d_q_ptr: tl.tensor,
    d_k_ptr: tl.tensor,
    d_v_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    d_rows_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_TILE: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    step = tl.num_programs(1) * TOKENS
    pair = tl.arange(0, HALF_TILE)
    width: tl.constexpr = 2 * HALF
    row_heads = heads + 2 * kv_heads
    if head >= heads + kv_heads:
        own_head = head - heads - kv_heads
        for start in range(chunk * TOKENS, tokens, step):
            token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
            inside = (token < tokens) & (pair < HALF)[None]
            own = (token * kv_heads + own_head) * width + pair[None]
            first, second = _load_halves(d_v_ptr + own, inside, HALF)
            place = (token * row_heads + head) * width + pair[None]
            _store_halves(d_rows_ptr + place, first, second, inside, HALF)
    else:
        is_query = head < heads
        own_heads = tl.where(is_query, heads, kv_heads)
        own_head = tl.where(is_query, head, head - heads)
        gradient_ptr = d_q_ptr if is_query else d_k_ptr
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        # One sum for each token of a tile. Adding tokens up makes warps wait for each other.
        sum_1 = tl.zeros([TOKENS, HALF_TILE], tl.float32)
        sum_2 = tl.zeros([TOKENS, HALF_TILE], tl.float32)
        for start in range(chunk * TOKENS, tokens, step):
            token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
            inside = (token < tokens) & (pair < HALF)[None]
            angle = token * HALF + pair[None]
            cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
            own = (token * own_heads + own_head) * width + pair[None]
            place = (token * row_heads + head) * width + pair[None]
            first, second = _of_head(
                gradient_ptr + own,
                rows_ptr + place,
                d_rows_ptr + place,
                weight_ptr,
                cos,
                sin,
                inside,
                eps,
                HALF,
                HALF_TILE,
            )
            sum_1 += first
            sum_2 += second
        # The caller adds up the parts of both weights at once, so each head adds 0 to the other.
        part_ptr = parts_ptr + (chunk * (heads + kv_heads) + head) * 2 * width + pair
        for half in tl.static_range(2):
            part = tl.sum(sum_1 if half == 0 else sum_2, axis=0)
            of_query = tl.where(is_query, part, 0.0)
            tl.store(part_ptr + half * HALF, of_query, mask=pair < HALF)
            of_key = tl.where(is_query, 0.0, part)
            tl.store(part_ptr + width + half * HALF, of_key, mask=pair < HALF)


@triton.jit
def _of_head(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    d_x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Writes the gradient of a head's projections. Returns both halves of each token's part of its
    weight's gradient."""
    first_weight, second_weight = _load_weight(weight_ptr, HALF, HALF_TILE)
    turned_1, turned_2 = _load_halves(gradient_ptr, inside, HALF)
    # The gradient of a rotation is the rotation by the opposite angle.
    gradient_1 = turned_1 * cos + turned_2 * sin
    gradient_2 = turned_2 * cos - turned_1 * sin
    x_1, x_2 = _load_halves(x_ptr, inside, HALF)
    scale = _scale(x_1, x_2, HALF, eps)
    unit_1 = x_1 * scale
    unit_2 = x_2 * scale
    d_unit_1 = gradient_1 * first_weight
    d_unit_2 = gradient_2 * second_weight
    # The part of the gradient along x changes nothing, because the norm divides it out.
    along = tl.sum(d_unit_1 * unit_1 + d_unit_2 * unit_2, axis=1)[:, None] / (2 * HALF)
    d_x_1 = scale * (d_unit_1 - unit_1 * along)
    d_x_2 = scale * (d_unit_2 - unit_2 * along)
    _store_halves(d_x_ptr, d_x_1, d_x_2, inside, HALF)
    return gradient_1 * unit_1, gradient_2 * unit_2


@triton.jit
def _scale(first: tl.tensor, second: tl.tensor, HALF: tl.constexpr, eps: tl.tensor) -> tl.tensor:
    """1 / sqrt(mean of squares + eps) of each token's head, (tokens, 1)."""
    squares = tl.sum(first * first + second * second, axis=1)[:, None]
    return 1.0 / tl.sqrt_rn(squares / (2 * HALF) + eps)


@triton.jit
def _load_weight(
    pointer: tl.tensor, HALF: tl.constexpr, HALF_TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of a norm's weight, (1, HALF_TILE)."""
    pair = tl.arange(0, HALF_TILE)
    first = tl.load(pointer + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    return first[None], second[None]


@triton.jit
def _load_halves(
    pointer: tl.tensor, inside: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    first = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(
    pointer: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    inside: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    kind = pointer.dtype.element_ty
    tl.store(pointer, first.to(kind), mask=inside)
    tl.store(pointer + HALF, second.to(kind), mask=inside)
