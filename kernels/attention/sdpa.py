"""Hybrid attention through torch's scaled_dot_product_attention: one call per kind of head, two calls for gated heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megaconsa.kernels.attention.gating import mix
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.attention.visibility import visible


def refusal(problem: Problem) -> str | None:
    """None: torch has a kernel, or its own plain implementation, for everything."""
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
    length = k.shape[1]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, D)
    windows = tuple(min(window, length) for window in windows)
    out = _by_window(q_, k_, v_, windows, documents, scale).transpose(1, 2)
    if gate is None:
        return out
    return mix(_attend(q_, k_, v_, length, documents, scale).transpose(1, 2), out, gate)


def _by_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    kinds = sorted(set(windows))
    if len(kinds) == 1:
        return _attend(q, k, v, kinds[0], documents, scale)
    group = q.shape[1] // k.shape[1]
    heads = [[head for head, window in enumerate(windows) if window == kind] for kind in kinds]
    queries = [
        [head * group + member for head in kind for member in range(group)] for kind in heads
    ]
    outputs = [
        _attend(q[:, query], k[:, head], v[:, head], kind, documents, scale)
        for kind, head, query in zip(kinds, heads, queries, strict=True)
    ]
    order = torch.tensor([head for kind in queries for head in kind], device=q.device)
    return torch.cat(outputs, dim=1)[:, order.argsort()]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, scale: float
) -> Tensor:
    if documents is None and window >= q.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    mask = visible(q.shape[2], window, documents, q.device)
    grouped = not q.is_cuda
    if not grouped:
        # On a GPU the only fused kernel that takes a mask wants equal heads; grouped ones fall back to holding all scores.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
