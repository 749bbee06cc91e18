"""The forward pass as a torch operator: it allocates the results and launches a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megaconsa.kernels.attention.hopper.forward import hopper_forward_kernel
from megaconsa.kernels.attention.launch import PADDING, forward_launch, on_hopper
from megaconsa.kernels.attention.triton.descriptors import (
    addressable,
    head_blocks,
    hopper_head_blocks,
)
from megaconsa.kernels.attention.triton.forward import forward_kernel
from megaconsa.kernels.attention.triton.placement import cache_bytes, on_device, schedule_heads
from megaconsa.kernels.attention.triton.schedule import section_size
from megaconsa.kernels.attention.triton.state import ForwardState
from megaconsa.kernels.limits import LOG2_E


def compute_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    gate: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (out, lse, lse_full, difference, difference_unit) as in `forward_kernel`.

    The last three are empty without a gate.
    """
    state = _empty_state(q, gate is not None)
    if state.out.numel() > 0:
        with on_device(q.device):
            _launch_forward(q, k, v, tuple(windows), gate, starts, scale, state)
    return state[:]  # torch's operators return plain tuples


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    starts: Tensor | None,
    scale: float,
    state: ForwardState,
) -> None:
    out, lse, lse_full, difference, difference_unit = state
    batch, length, heads, dim = q.shape
    _, keys, kv_heads, _ = k.shape
    earlier_keys = keys - length
    q, k, v = (addressable(x) for x in (q, k, v))
    hopper = on_hopper(q, k)
    launch = forward_launch(q, gated=gate is not None, hopper=hopper)
    block_d = triton.next_power_of_2(dim)
    padded = lse.shape[2]
    tiles = padded // launch.block_m
    window_tensor, order = schedule_heads(windows, gate, batch, keys, q.device)
    pair_bytes = 2 * keys * dim * q.element_size()  # keys and values of one KV head
    section = section_size(batch * kv_heads, pair_bytes, cache_bytes(q.device))
    arguments = (
        lse,
        lse_full,
        # Without a gate or documents the kernel does not read these arguments: any tensor will do.
        lse if gate is None else gate.contiguous(),
        window_tensor,
        window_tensor if starts is None else starts,
        order,
        batch,
        length,
        padded,
        kv_heads,
        tiles,
        section,
        scale * LOG2_E,
    )
    constants = {
        "GROUP": heads // kv_heads,
        "HEAD_DIM": dim,
        "BLOCK_D": block_d,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "GATED": gate is not None,
        "PACKED": starts is not None,
        "num_warps": launch.num_warps,
    }
    grid = (tiles * batch * heads,)
    if hopper:
        out_descriptor = hopper_head_blocks(out, launch.block_m, block_d)
        difference_descriptor = out_descriptor
        if gate is not None:
            difference_descriptor = hopper_head_blocks(difference, launch.block_m, block_d)
        hopper_forward_kernel[grid](
            hopper_head_blocks(q, launch.block_m, block_d),
            hopper_head_blocks(k, launch.block_n, block_d),
            hopper_head_blocks(v, launch.block_n, block_d),
            out_descriptor,
            difference_descriptor,
            difference_unit,
            *arguments,
            **constants,
        )
    else:
        forward_kernel[grid](
            head_blocks(q, launch.block_m, block_d),
            head_blocks(k, launch.block_n, block_d),
            head_blocks(v, launch.block_n, block_d),
            out,
            difference,
            difference_unit,
            *arguments,
            earlier_keys,
            **constants,
            num_stages=launch.num_stages,
        )


forward = torch.library.custom_op("megaconsa::hybrid_attention", compute_forward, mutates_args=())
"""`compute_forward` as an operator, which torch.compile can trace."""


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    gate: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_state(q, gate is not None)[:]


def _empty_state(q: Tensor, gated: bool) -> ForwardState:
    batch, length, heads, dim = q.shape
    statistics = (batch, heads, triton.cdiv(length, PADDING) * PADDING)
    return ForwardState(
        q.new_empty((batch, length, heads, dim)),
        q.new_empty(statistics, dtype=torch.float32),
        q.new_empty(statistics if gated else (0,), dtype=torch.float32),
        q.new_empty((batch, length, heads, dim) if gated else (0,)),
        q.new_empty(statistics if gated else (0,), dtype=torch.float32),
    )
