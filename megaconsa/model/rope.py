"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Qwen3."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / (
        theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float().to(device) / head_dim)
    )


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles. positions: (B, S) integers. Returns two fp32 tensors (B, S, 1, head_dim / 2)."""
    angles = positions[..., None, None].float() * _inverse_frequencies(
        head_dim, theta, positions.device
    )
    return angles.cos(), angles.sin()
