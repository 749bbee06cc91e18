"""The output of gated heads, for backends that compute full and windowed attention separately."""

from __future__ import annotations

import torch
from torch import Tensor


def without_ends(gate: Tensor) -> Tensor:
    """The gate, with a gradient of 0 where it is exactly 0 or 1.

    That is the derivative of the clamp which put it there. Kernels that skip the keys before the
    window of a closed head could not compute another one.
    """
    is_inside = (gate > 0) & (gate < 1)
    return torch.where(is_inside, gate, gate.detach())


def mix(full: Tensor, windowed: Tensor, gate: Tensor) -> Tensor:
    """z * full + (1 - z) * windowed, computed in fp32 or wider.

    full, windowed: (B, S, heads, D).
    gate: z, (B, kv_heads).

    Returns a tensor in the precision of `full`.
    """
    wide = torch.promote_types(full.dtype, torch.float32)
    group = full.shape[2] // gate.shape[1]
    z = without_ends(gate).to(wide).repeat_interleave(group, dim=1)[:, None, :, None]
    return torch.lerp(windowed.to(wide), full.to(wide), z).to(full.dtype)
