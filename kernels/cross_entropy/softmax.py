"""What a row's softmax needs besides the row, and a number below every logit."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LOWEST = -1e30
"""A number below every logit. Not -inf, because -inf minus itself is NaN."""


class Softmax(NamedTuple):
    """What a row's softmax needs besides the row itself, fp32 (N,) each."""

    maximum: Tensor
    total: Tensor
    """Sum of exp(x - maximum)."""
