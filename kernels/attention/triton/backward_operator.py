"""The backward pass as a torch operator: it allocates the gradients and launches the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megaconsa.kernels.attention.hopper.backward import hopper_backward_kernel
from megaconsa.kernels.attention.launch import backward_launch, on_hopper
from megaconsa.kernels.attention.triton.backward import (
    backward_kernel,
    bound_kernel,
    finish_kernel,
    prepare_kernel,
)
from megaconsa.kernels.attention.triton.descriptors import (
    addressable,
    head_blocks,
    hopper_head_blocks,
    hopper_matrix_blocks,
)
from megaconsa.kernels.attention.triton.placement import cache_bytes, on_device, schedule_heads
from megaconsa.kernels.attention.triton.schedule import section_size
from megaconsa.kernels.attention.triton.state import ForwardState, Gradients
from megaconsa.kernels.limits import INTERPRETED, LOG2_E

PREPARED_ROWS = 64
"""Queries per program of `prepare_kernel` and `finish_kernel`. Hopper's kernel needs 64."""
BOUND_KEYS = 64
"""Keys that a program of `bound_kernel` loads at a time."""
BOUND_BLOCKS = 16
"""How many times a program of `bound_kernel` loads keys."""


def compute_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    gate: Tensor | None,
    ends: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    lse_full: Tensor,
    difference: Tensor,
    difference_unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv, dz).

    dz is fp32 (B, kv_heads), empty without a gate, and 0 for gates at exactly 0 or 1.
    """
    state = ForwardState(out, lse, lse_full, difference, difference_unit)
    gradients = _empty_gradients(q, k, gate is not None)
    if q.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients[:]
    with on_device(q.device):
        _launch_backward(d_out, q, k, v, tuple(windows), gate, ends, scale, state, gradients)
    return gradients[:]


def _launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    ends: Tensor | None,
    scale: float,
    state: ForwardState,
    gradients: Gradients,
) -> None:
    out, lse, lse_full, difference, difference_unit = state
    d_q, d_k, d_v, d_gate = gradients
    batch, length, heads, dim = q.shape
    _, keys, kv_heads, _ = k.shape
    earlier_keys = keys - length
    q, k, v = (addressable(x) for x in (q, k, v))
    hopper = on_hopper(q, k)
    launch = backward_launch(q, gated=gate is not None, hopper=hopper)
    block_d = triton.next_power_of_2(dim)
    group = heads // kv_heads
    exact = q.dtype == torch.float32
    d_out = addressable(d_out)

    padded = lse.shape[2]
    rows = 4 if gate is None else 8  # of a query's statistics, see `prepare_kernel`
    row_tiles = padded // PREPARED_ROWS
    statistics = lse.new_empty((batch * heads * rows, padded))
    units = q.new_empty(
        (batch * heads * padded, block_d), dtype=torch.int64 if exact else torch.int32
    )
    bound_parts = triton.cdiv(keys, BOUND_KEYS * BOUND_BLOCKS)
    bounds = lse.new_empty((batch, kv_heads, 2, bound_parts))
    bound_kernel[(batch * kv_heads * bound_parts,)](
        k,
        v,
        bounds,
        keys,
        kv_heads,
        *k.stride()[:3],
        *v.stride()[:3],
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_N=BOUND_KEYS,
        BLOCKS=BOUND_BLOCKS,
    )
    # max_j |k_jd| times max_j |v_j| bounds dq: see docs/kernels.md.
    largest_key, largest_value = bounds.amax(dim=3).unbind(dim=2)
    largest = largest_key * largest_value.sqrt()
    parts = lse.new_empty((batch, kv_heads, group * row_tiles) if gate is not None else (0,))
    gates = lse if gate is None else gate.contiguous()
    prepare_kernel[(row_tiles * batch * heads,)](
        out,
        difference,
        difference_unit,
        d_out,
        lse,
        lse_full,
        largest,
        gates,
        statistics,
        parts,
        units,
        length,
        padded,
        kv_heads,
        d_out.stride(0),
        d_out.stride(1),
        d_out.stride(2),
        GROUP=group,
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=PREPARED_ROWS,
        GATED=gate is not None,
        ROWS=rows,
        UNIT_BITS=62 if exact else 30,
    )
    tiles = triton.cdiv(keys, launch.block_n)
    window_tensor, order = schedule_heads(windows, gate, batch, keys, q.device)
    # A tile of keys reads all queries and gradients of the output, and adds to all sums of dq.
    pair_bytes = group * length * dim * (2 * q.element_size() + units.element_size())
    section = section_size(batch * kv_heads, pair_bytes, cache_bytes(q.device))
    arguments = (
        gates,
        window_tensor,
        window_tensor if ends is None else ends,
        order,
        batch,
        keys,
        padded,
        kv_heads,
        tiles,
        section,
        scale * LOG2_E,
        scale,
    )
    constants = {
        "GROUP": group,
        "HEAD_DIM": dim,
        "BLOCK_D": block_d,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "GATED": gate is not None,
        "PACKED": ends is not None,
        "num_warps": launch.num_warps,
    }
    grid = (tiles * batch * kv_heads,)
    if hopper:
        hopper_backward_kernel[grid](
            hopper_head_blocks(q, launch.block_m, block_d),
            hopper_head_blocks(k, launch.block_n, block_d),
            hopper_head_blocks(v, launch.block_n, block_d),
            hopper_head_blocks(d_out, launch.block_m, block_d),
            hopper_matrix_blocks(units, launch.block_m, block_d),
            hopper_matrix_blocks(statistics, 4, launch.block_m),
            d_k,
            d_v,
            statistics,
            *arguments,
            **constants,
        )
    else:
        backward_kernel[grid](
            head_blocks(q, launch.block_m, block_d),
            head_blocks(k, launch.block_n, block_d),
            head_blocks(v, launch.block_n, block_d),
            head_blocks(d_out, launch.block_m, block_d),
            units,
            d_k,
            d_v,
            statistics,
            *arguments,
            earlier_keys,
            **constants,
            ROWS=rows,
            NEAREST=not exact and not INTERPRETED,
            num_stages=launch.num_stages,
        )
    finish_kernel[(row_tiles * batch * heads,)](
        units,
        statistics,
        d_q,
        length,
        padded,
        heads,
        scale,
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=PREPARED_ROWS,
        ROWS=rows,
        REGISTER_ORDER=hopper,
    )
    if gate is not None:
        torch.sum(parts, dim=-1, out=d_gate)


backward = torch.library.custom_op(
    "megaconsa::hybrid_attention_backward", compute_backward, mutates_args=()
)
"""`compute_backward` as an operator, which torch.compile can trace."""


@backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    gate: Tensor | None,
    ends: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    lse_full: Tensor,
    difference: Tensor,
    difference_unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, gate is not None)[:]


def _empty_gradients(q: Tensor, k: Tensor, gated: bool) -> Gradients:
    gate_shape = (k.shape[0], k.shape[2]) if gated else (0,)
    return Gradients(
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        k.new_empty(k.shape),
        q.new_empty(gate_shape, dtype=torch.float32),
    )
