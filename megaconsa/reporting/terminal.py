"""Pictures made of characters, for the terminal."""

from __future__ import annotations

from megaconsa.consa.allocation import Allocation


def text_map(allocation: Allocation) -> str:
    """Returns an allocation as text, one line per layer, with layer 0 at the top.

    A block is full attention, and a dot is the sliding window.
    """
    digits = len(str(allocation.num_layers - 1))
    lines = []
    for layer, row in enumerate(allocation.full):
        cells = "".join("██" if full else " ·" for full in row)
        lines.append(f"layer {layer:>{digits}}  {cells}  {sum(row)}/{len(row)} full")
    return "\n".join(lines)
