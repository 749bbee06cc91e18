"""The output of gated heads, for backends that compute full and windowed attention separately."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(full: Tensor, windowed: Tensor, gate: Tensor) -> Tensor:
    """z * full + (1 - z) * windowed, computed in fp32 or wider.

    full, windowed: (B, S, heads, D).
    gate: z, (B, kv_heads).

    Returns a tensor in the precision of `full`.
    """
    wide = torch.promote_types(full.dtype, torch.float32)
    group = full.shape[2] // gate.shape[1]
    z = gate.to(wide).repeat_interleave(group, dim=1)[:, None, :, None]
    return torch.lerp(windowed.to(wide), full.to(wide), z).to(full.dtype)
