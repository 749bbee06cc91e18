"""Which keys a query sees: causal, within its head's window, within its document."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(length: int, window: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """The mask of visible keys.

    Key j is visible to query i iff 0 <= i - j < window and both are in the same document.

    documents: (B, S) non-decreasing ids, or None.

    Returns booleans (B or 1, 1, S, S), True where visible.
    """
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    mask = ((distance >= 0) & (distance < window))[None, None]
    if documents is None:
        return mask
    same_document = documents[:, None, :, None] == documents[:, None, None, :]
    return mask & same_document
