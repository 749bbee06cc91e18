"""Rotary position embedding in Triton: one program rotates all heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """As `megaconsa.kernels.rotary.rotary.rotate`.

    inverse: rotate back, which is the gradient of the rotation.
    """
    batch, length, heads, dim = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rotate[(batch * length,)](
            x,
            cos,
            sin,
            out,
            heads,
            HALF=dim // 2,
            INVERSE=inverse,
            HEADS_TILE=triton.next_power_of_2(heads),
            HALF_TILE=triton.next_power_of_2(dim // 2),
        )
    return out


@triton.jit
def _rotate(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    heads: tl.tensor,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_TILE)
    head = tl.arange(0, HEADS_TILE)
    cos = tl.load(cos_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)[None]
    sin = tl.load(sin_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)[None]
    if INVERSE:
        sin = -sin
    place = token * heads * 2 * HALF + head[:, None] * 2 * HALF + pair[None]
    inside = (head < heads)[:, None] & (pair < HALF)[None]
    first = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + place, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside
    )
    tl.store(
        out_ptr + place + HALF,
        (second * cos + first * sin).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
