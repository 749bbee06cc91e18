"""Gated heads through FlashAttention, without computing the window twice.

The output of a gated head is z * full + (1 - z) * windowed. The keys that full attention sees are
those of the window and those before it, and FlashAttention computes attention to either. Their
log-sum-exps say how much weight each has in full attention. So a gated head costs as much as a full
one, where two calls for full and for windowed attention would compute the window twice.

The keys before the window need no mask of their own: the query at position t sees them up to
t - W, so the queries from W on and the keys up to S - W make a causal attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaconsa.kernels.attention import flash_library
from megaconsa.kernels.attention.head_runs import Run, runs
from megaconsa.kernels.attention.triton import parts


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    closed: Sequence[bool] | None,
    window: int,
    scale: float,
) -> Tensor:
    """The output of gated heads with one window, (B, S, heads, D).

    q: (B, S, heads, D).
    k, v: (B, S, kv_heads, D).
    gate: z, fp32 (B, kv_heads).
    closed: whether z is 0 in every sequence, for each KV head, or None.
    window: visible keys, less than S.
    """
    closed = closed or [False] * k.shape[2]
    out: Tensor = _GatedAttention.apply(q, k, v, gate, closed, window, scale)
    return out


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        closed: Sequence[bool],
        window: int,
        scale: float,
    ) -> Tensor:
        batch, length, heads, dim = q.shape
        late = length - window
        library = flash_library.find(q.device)
        out = q.new_empty(q.shape)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        library.forward(q, k, v, out, lse, window, scale)
        before = q.new_empty(batch, late, heads, dim)
        lse_before = q.new_empty(batch, heads, late, dtype=torch.float32)
        late_q, early_k, early_v = q[:, window:], k[:, :late], v[:, :late]
        for _, kv, query in _open_runs(closed, late, heads // k.shape[2]):
            own_lse = torch.empty_like(lse_before[:, query])
            library.forward(
                late_q[..., query, :],
                early_k[..., kv, :],
                early_v[..., kv, :],
                before[..., query, :],
                own_lse,
                None,
                scale,
            )
            lse_before[:, query] = own_lse
        parts.join(out, before, lse, lse_before, gate, window)
        ctx.save_for_backward(q, k, v, gate, out, before, lse, lse_before)
        ctx.closed = closed
        ctx.window = window
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, gate, out, difference, lse, lse_full = ctx.saved_tensors
        window = ctx.window
        scale = ctx.scale
        late = q.shape[1] - window
        library = flash_library.find(q.device)
        d_out = d_out.contiguous()
        d_windowed, windowed, full, d_gate = parts.divide(
            d_out, out, difference, lse, lse_full, gate, window
        )
        d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        library.backward(d_windowed, q, k, v, windowed, lse, d_q, d_k, d_v, window, scale)
        late_d_q = q.new_empty(full.shape)
        early_d_k, early_d_v = k.new_empty(k[:, :late].shape), v.new_empty(v[:, :late].shape)
        for _, kv, query in _open_runs(ctx.closed, late, q.shape[2] // k.shape[2]):
            # All gradients are linear in that of the output, so z can be multiplied in later.
            library.backward(
                d_out[:, window:, query],
                q[:, window:, query],
                k[:, :late, kv],
                v[:, :late, kv],
                full[..., query, :],
                lse_full[:, query].contiguous(),
                late_d_q[..., query, :],
                early_d_k[..., kv, :],
                early_d_v[..., kv, :],
                None,
                scale,
            )
        parts.add_gated(d_q, late_d_q, gate, window)
        parts.add_gated(d_k, early_d_k, gate, 0)
        parts.add_gated(d_v, early_d_v, gate, 0)
        return d_q, d_k, d_v, d_gate, None, None, None


def _open_runs(closed: Sequence[bool], length: int, group: int) -> list[Run]:
    """Neighbouring heads that are not closed.

    length: tokens of a sequence.
    group: query heads per KV head.
    """
    visible = [0 if is_closed else length for is_closed in closed]
    return [run for run in runs(visible, length, group) if run.window is None]
