"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Qwen3's half-split layout."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megaconsa.kernels.last_result import remember_last
from megaconsa.model.context_group import ContextGroup


@lru_cache(maxsize=8)
def _inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """1 / theta^(2 i / head_dim) for each i, fp32 (head_dim / 2,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float().to(device) / head_dim
    return 1.0 / (theta**exponents)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles.

    positions: (B, S) integers.

    Returns two fp32 tensors (B, S, 1, head_dim / 2).
    """
    frequencies = _inverse_frequencies(head_dim, theta, positions.device)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


@remember_last
def document_angles(
    documents: Tensor, head_dim: int, theta: float, context: ContextGroup
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of positions that restart with each document.

    documents: (B, S) int32, index at which each position's document starts.
    context: the ranks that divide sequences. The angles are those of this rank's tokens.

    Returns as `rotary_angles` does. All layers of a micro-batch share the result.
    """
    # The start of a document is both its id and its origin.
    positions = torch.arange(documents.shape[1], device=documents.device) - documents
    return rotary_angles(context.own_part(positions), head_dim, theta)
