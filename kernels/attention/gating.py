"""Gated heads where both attentions are computed apart."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(full: Tensor, windowed: Tensor, gate: Tensor) -> Tensor:
    """z * full + (1 - z) * windowed, computed in fp32 or wider. full, windowed: (B, S, heads, D); gate: (B, kv_heads)."""
    wide = torch.promote_types(full.dtype, torch.float32)
    z = gate.to(wide).repeat_interleave(full.shape[2] // gate.shape[1], dim=1)[:, None, :, None]
    return torch.lerp(windowed.to(wide), full.to(wide), z).to(full.dtype)
