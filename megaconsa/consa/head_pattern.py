"""What the KV heads of a layer see."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class HeadPattern(NamedTuple):
    """Windows and gates of a layer's KV heads."""

    windows: int | tuple[int, ...]
    """Visible keys: one number for all heads, or one per KV head."""
    gate: Tensor | None = None
    """While learning: z per KV head, fp32 (B, kv_heads), or (kv_heads,) for all sequences."""


class HeadSelector(Protocol):
    """Tells a layer the kind of its heads.

    It is an Allocation (a finished table) or a GateBank (while learning).
    """

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        """The pattern of a layer for a micro-batch.

        sequences: (B,) int64, indices within the step's global batch.
        """
