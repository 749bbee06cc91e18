"""Pictures made of characters."""

from __future__ import annotations

from megaconsa.consa.allocation import Allocation


def text_map(allocation: Allocation) -> str:
    """An allocation, one line a layer, layer 0 at the bottom: a block is full attention, a dot the sliding window."""
    digits = len(str(allocation.num_layers - 1))
    lines = []
    for layer in reversed(range(allocation.num_layers)):
        row = allocation.full[layer]
        cells = "".join("██" if full else " ·" for full in row)
        lines.append(f"layer {layer:>{digits}}  {cells}  {sum(row)}/{len(row)} full")
    return "\n".join(lines)
