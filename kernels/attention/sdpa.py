"""Hybrid attention through torch's scaled_dot_product_attention.

It makes one call per kind of head, and two calls for gated heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megaconsa.kernels.attention.gating import mix
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.attention.visibility import visible


def refusal(problem: Problem) -> str | None:
    """None: torch has a kernel, or its own plain implementation, for everything."""
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Hybrid attention. Shapes are those of `hybrid_attention`, except for this one:

    heads: windows and gates of all KV heads. A gate is (B, kv_heads).
    """
    windows, gate, _ = heads
    length = k.shape[1]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, D)
    windows = tuple(min(window, length) for window in windows)
    out = _by_window(q_, k_, v_, windows, documents, scale).transpose(1, 2)
    if gate is None:
        return out
    full = _attend(q_, k_, v_, length, documents, scale).transpose(1, 2)
    return mix(full, out, gate)


def _by_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """One call for the heads of each window.

    q: (B, heads, S, D).
    k, v: (B, kv_heads, S, D).
    """
    kinds = sorted(set(windows))
    if len(kinds) == 1:
        return _attend(q, k, v, kinds[0], documents, scale)
    group = q.shape[1] // k.shape[1]
    outputs: list[Tensor] = []
    order: list[int] = []  # query heads in the order of the outputs
    for kind in kinds:
        kv_heads = [head for head, window in enumerate(windows) if window == kind]
        q_heads = [head * group + member for head in kv_heads for member in range(group)]
        outputs.append(
            _attend(q[:, q_heads], k[:, kv_heads], v[:, kv_heads], kind, documents, scale)
        )
        order += q_heads
    original = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outputs, dim=1)[:, original]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, scale: float
) -> Tensor:
    length = k.shape[2]
    earlier_keys = length - q.shape[2]
    if documents is None and window >= length and earlier_keys == 0:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    mask = visible(length, window, documents, q.device, earlier_keys)
    grouped = not q.is_cuda
    if not grouped:
        # The only fused GPU kernel that takes a mask wants as many KV heads as query heads.
        # With fewer KV heads torch falls back to holding all scores.
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
