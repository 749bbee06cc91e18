"""What the forward pass leaves for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ForwardState(NamedTuple):
    """The output and statistics of the forward pass. The last three are empty without a gate."""

    out: Tensor
    """(B, S, heads, D)."""
    lse: Tensor
    """Log-sum-exp in base 2 over the keys in each query's window, fp32 (B, heads, padded S)."""
    lse_full: Tensor
    """The same over all keys."""
    difference: Tensor
    """Full minus windowed output in fixed point, (B, S, heads, D)."""
    difference_unit: Tensor
    """Unit of each row of `difference`, fp32 (B, heads, padded S)."""


class Gradients(NamedTuple):
    """The results of the backward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    """fp32 (B, kv_heads), empty without a gate."""
