"""The Triton backend: registered torch operators around the kernels, with their autograd and fake implementations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from megaconsa.kernels.attention.hopper.backward import hopper_backward_kernel
from megaconsa.kernels.attention.hopper.forward import hopper_forward_kernel
from megaconsa.kernels.attention.launch import PADDING, backward_launch, forward_launch, on_hopper
from megaconsa.kernels.attention.problem import Problem
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
from megaconsa.kernels.attention.triton.forward import forward_kernel
from megaconsa.kernels.attention.triton.schedule import order_kernel, section_size
from megaconsa.kernels.limits import DTYPES, HEAD_DIMS, INTERPRETED, LOG2_E

PREPARED_ROWS = 64
"""Queries of a program of the two small kernels around the backward pass; Hopper's kernel wants 64."""
BOUND_KEYS, BOUND_BLOCKS = 64, 16
"""Keys at a time, and times, of a program that looks for the largest key and value."""


def refusal(problem: Problem) -> str | None:
    """Why these kernels cannot serve the problem, or None."""
    if torch.version.hip:
        return "triton's kernels here are for NVIDIA GPUs; take sdpa"
    if problem.device.type != "cuda" and not INTERPRETED:
        return "triton needs a CUDA GPU; take sdpa on this device"
    if problem.dtype not in DTYPES:
        return f"triton computes in fp32, fp16 and bf16, not {problem.dtype}; take reference"
    if problem.head_dim not in HEAD_DIMS:
        return f"triton supports head_dim {', '.join(map(str, HEAD_DIMS))}, not {problem.head_dim}; take sdpa"
    if not problem.scale > 0:
        return f"triton needs a positive scale, not {problem.scale}; take sdpa"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Shapes as in `hybrid_attention`; windows one per KV head; gate (B, kv_heads) or None."""
    starts, ends = (None, None) if documents is None else document_bounds(documents)
    windows = tuple(min(window, q.shape[1]) for window in windows)
    return forward(q, k, v, windows, None if gate is None else gate.float(), starts, ends, scale)[0]


def document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First position (B, S) and end (exclusive) of each token's document, int32, from its non-decreasing ids."""
    documents = documents.contiguous()
    return (
        torch.searchsorted(documents, documents, out_int32=True),
        torch.searchsorted(documents, documents, out_int32=True, right=True),
    )


@torch.library.custom_op("megaconsa::hybrid_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    gate: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, lse_full, difference, difference_unit) as in `forward_kernel`; the last three are empty without a gate."""
    out, lse, lse_full, difference, difference_unit = _outputs(q, gate is not None)
    if out.numel() == 0:
        return out, lse, lse_full, difference, difference_unit
    with _on(q.device):
        _launch_forward(
            q,
            k,
            v,
            tuple(windows),
            gate,
            starts,
            scale,
            out,
            lse,
            lse_full,
            difference,
            difference_unit,
        )
    return out, lse, lse_full, difference, difference_unit


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    starts: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    lse_full: Tensor,
    difference: Tensor,
    difference_unit: Tensor,
) -> None:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = (addressable(x) for x in (q, k, v))
    launch = forward_launch(q, gated=gate is not None)
    block_d = triton.next_power_of_2(dim)
    padded = lse.shape[2]
    tiles = padded // launch.block_m
    window_tensor, order = _schedule(windows, gate, batch, length, q.device)
    section = section_size(
        batch * kv_heads, 2 * length * dim * q.element_size(), _cache_bytes(q.device)
    )
    arguments = (
        lse,
        lse_full,
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
    if on_hopper(q):
        out_descriptor = hopper_head_blocks(out, launch.block_m, block_d)
        hopper_forward_kernel[grid](
            hopper_head_blocks(q, launch.block_m, block_d),
            hopper_head_blocks(k, launch.block_n, block_d),
            hopper_head_blocks(v, launch.block_n, block_d),
            out_descriptor,
            out_descriptor
            if gate is None
            else hopper_head_blocks(difference, launch.block_m, block_d),
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
            **constants,
            num_stages=launch.num_stages,
        )


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
    return _outputs(q, gate is not None)


def _outputs(q: Tensor, gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, dim = q.shape
    statistics = (batch, heads, triton.cdiv(length, PADDING) * PADDING)
    return (
        q.new_empty((batch, length, heads, dim)),
        q.new_empty(statistics, dtype=torch.float32),
        q.new_empty(statistics if gated else (0,), dtype=torch.float32),
        q.new_empty((batch, length, heads, dim) if gated else (0,)),
        q.new_empty(statistics if gated else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("megaconsa::hybrid_attention_backward", mutates_args=())
def backward(
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
    """(dq, dk, dv, dz); dz is fp32 (B, kv_heads), empty without a gate, and 0 for gates at exactly 0 or 1."""
    d_q, d_k, d_v, d_gate = _gradients(q, k, gate is not None)
    if q.numel() == 0:
        return d_q, d_k.zero_(), d_v.zero_(), d_gate.zero_()
    with _on(q.device):
        _launch_backward(
            d_out,
            q,
            k,
            v,
            tuple(windows),
            gate,
            ends,
            scale,
            out,
            lse,
            lse_full,
            difference,
            difference_unit,
            d_q,
            d_k,
            d_v,
            d_gate,
        )
    return d_q, d_k, d_v, d_gate


def _launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    ends: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    lse_full: Tensor,
    difference: Tensor,
    difference_unit: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_gate: Tensor,
) -> None:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = (addressable(x) for x in (q, k, v))
    launch = backward_launch(q, gated=gate is not None)
    block_d = triton.next_power_of_2(dim)
    group = heads // kv_heads
    exact = q.dtype == torch.float32
    d_out = addressable(d_out)

    padded = lse.shape[2]
    rows = 4 if gate is None else 8
    row_tiles = padded // PREPARED_ROWS
    hopper = on_hopper(q)
    statistics = lse.new_empty((batch * heads * rows, padded))
    units = q.new_empty(
        (batch * heads * padded, block_d), dtype=torch.int64 if exact else torch.int32
    )
    bound_parts = triton.cdiv(length, BOUND_KEYS * BOUND_BLOCKS)
    bounds = lse.new_empty((batch, kv_heads, 2, bound_parts))
    bound_kernel[(batch * kv_heads * bound_parts,)](
        k,
        v,
        bounds,
        length,
        kv_heads,
        *k.stride()[:3],
        *v.stride()[:3],
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_N=BOUND_KEYS,
        BLOCKS=BOUND_BLOCKS,
    )
    # max_j |k_jd| times max_j |v_j| bounds dq: see triton_backward.
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
    tiles = triton.cdiv(length, launch.block_n)
    window_tensor, order = _schedule(windows, gate, batch, length, q.device)
    # Queries and gradients of the output are read, and the sums of dq read and written, all along a tile of keys.
    pair_bytes = group * length * dim * (2 * q.element_size() + units.element_size())
    section = section_size(batch * kv_heads, pair_bytes, _cache_bytes(q.device))
    arguments = (
        gates,
        window_tensor,
        window_tensor if ends is None else ends,
        order,
        batch,
        length,
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
    return _gradients(q, k, gate is not None)


def _gradients(q: Tensor, k: Tensor, gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_shape = (k.shape[0], k.shape[2]) if gated else (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        k.new_empty(k.shape),
        q.new_empty(gate_shape, dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.windows, gate, _, ends, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gate, ends, *output)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    q, k, v, gate, ends, *statistics = ctx.saved_tensors
    d_q, d_k, d_v, d_gate = backward(
        d_out, q, k, v, ctx.windows, gate, ends, ctx.scale, *statistics
    )
    return d_q, d_k, d_v, None, None if gate is None else d_gate, None, None, None


forward.register_autograd(_autograd, setup_context=_save)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _schedule(
    windows: tuple[int, ...], gate: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The windows, and the (row, head) pairs, costly ones first: see `tile_of_program`."""
    window_tensor, order = _on_device(windows, batch, device)
    if gate is not None:
        pairs = batch * len(windows)
        order = torch.empty_like(order)
        block = triton.next_power_of_2(pairs)
        order_kernel[(1,)](
            gate.contiguous(), window_tensor, order, pairs, len(windows), length, BLOCK=block
        )
    return window_tensor, order


@lru_cache(maxsize=1024)
def _on_device(windows: tuple[int, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The windows, and the pairs by falling window; kept, since copying them to a GPU waits for it.

    For the same reason call the operator once before capturing a CUDA graph with new windows or a new batch size.
    """
    heads = sorted(range(len(windows)), key=lambda head: -windows[head])
    order = [row * len(windows) + head for head in heads for row in range(batch)]
    return (
        torch.tensor(windows, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )


@lru_cache
def _cache_bytes(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 25
    )
