"""The reference that all backends are compared with: hybrid attention with explicit masks.

It is slow and runs on any device. It computes fp64 inputs in fp64, all others in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.kernels.attention.gating import without_ends
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.attention.visibility import visible


def refusal(problem: Problem) -> str | None:
    """None: the reference serves everything that fits into memory."""
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Hybrid attention with all scores in memory: (B, heads, queries, S).

    Shapes are those of `hybrid_attention`, except for this one:

    heads: windows and gates of all KV heads. A gate is (B, kv_heads).
    """
    windows, gate, _ = heads
    group = q.shape[2] // k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_ = q.transpose(1, 2).to(compute)
    k_ = k.repeat_interleave(group, 2).transpose(1, 2).to(compute)
    v_ = v.repeat_interleave(group, 2).transpose(1, 2).to(compute)
    scores = q_ @ k_.transpose(-1, -2) * scale  # (B, heads, queries, S)
    length = k.shape[1]
    earlier_keys = length - q.shape[1]

    def attend(per_head: tuple[int, ...]) -> Tensor:
        masks = [visible(length, window, documents, q.device, earlier_keys) for window in per_head]
        mask = torch.cat(masks, dim=1).repeat_interleave(group, dim=1)
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v_

    out = attend(windows)
    if gate is not None:
        z = without_ends(gate).to(compute).repeat_interleave(group, dim=1)[:, :, None, None]
        full = attend((length,) * len(windows))
        out = z * full + (1 - z) * out
    return out.transpose(1, 2).to(q.dtype)
