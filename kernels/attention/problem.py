"""The description of a call of hybrid attention, by which a backend is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """Everything about a call that may decide whether a backend can serve it."""

    device: torch.device
    dtype: torch.dtype
    """of q, k and v"""
    batch: int
    length: int
    """tokens of a sequence"""
    heads: int
    """query heads"""
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    """one per KV head"""
    gated: bool
    packed: bool
    """whether documents packed into a sequence are hidden from each other"""
    scale: float
    closed: int = 0
    """KV heads whose gate is known to be 0 in every sequence"""
    earlier_keys: int = 0
    """tokens at the start of a sequence that are keys and not queries"""

    @property
    def mixed(self) -> bool:
        """Whether heads differ in the keys they see.

        All windows of at least the sequence length are one kind, full attention.
        """
        first = self.windows[0]
        return any(window != first and min(window, first) < self.length for window in self.windows)
