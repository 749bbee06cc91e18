"""How a layer is told what its heads see."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megaconsa.kernels.attention.head_pattern import HeadPattern


class HeadSelector(Protocol):
    """Tells a layer the kind of its heads.

    It is an Allocation (a finished table) or a GateBank (while learning).
    """

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        """The pattern of a layer for a micro-batch.

        sequences: (B,) int64, indices within the step's global batch.
        """
