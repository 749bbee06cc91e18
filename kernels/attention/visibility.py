"""Which keys a query sees: causal, within its head's window, within its document."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    length: int,
    window: int,
    documents: Tensor | None,
    device: torch.device,
    earlier_keys: int = 0,
) -> Tensor:
    """The mask of visible keys.

    Key j is visible to query i iff 0 <= i - j < window and both are in the same document.

    length: tokens of a sequence, S. Every one is a key.
    documents: (B, S) non-decreasing ids, or None.
    earlier_keys: tokens at the start that are keys and not queries.

    Returns booleans (B or 1, 1, S - earlier_keys, S), True where visible.
    """
    index = torch.arange(length, device=device)
    queries = index[earlier_keys:]
    distance = queries[:, None] - index[None, :]
    mask = ((distance >= 0) & (distance < window))[None, None]
    if documents is None:
        return mask
    same_document = documents[:, None, earlier_keys:, None] == documents[:, None, None, :]
    return mask & same_document
