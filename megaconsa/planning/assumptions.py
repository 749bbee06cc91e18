"""What a plan assumes where nothing is known yet."""

from __future__ import annotations

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint


def even_allocation(constraint: Constraint, window: int) -> Allocation:
    """A table that meets the constraint, with its full units spread evenly over the layers."""
    layers = constraint.num_layers
    total = constraint.full * constraint.count
    rows = []
    placed = 0
    for layer in range(layers):
        upto = total * (layer + 1) // layers
        count = upto - placed
        placed = upto
        if constraint.granularity == "layer":
            row = [count > 0] * constraint.num_kv_heads
        else:
            row = [head < count for head in range(constraint.num_kv_heads)]
        rows.append(row)
    return Allocation.from_heads(rows, constraint, window, {"assumed": "evenly spread"})
