"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recomputation:
    """The model's layers, from 0, of which something is recomputed.

    No layer is in both. Results do not depend on either.
    """

    heads: tuple[int, ...] = ()
    """Layers whose q and k are recomputed. It hardly takes time.

    Only blocks that run by the kernels of a GPU do it. Others keep q and k."""
    whole: tuple[int, ...] = ()
    """Layers that are recomputed from their inputs. It takes as long as their forward pass."""

    def describe(self, num_layers: int) -> str:
        """For example `q and k of 20 of 28 layers`."""
        if not self.heads:
            return f"{len(self.whole)} of {num_layers} layers"
        if not self.whole:
            return f"q and k of {len(self.heads)} of {num_layers} layers"
        return f"{len(self.whole)} of {num_layers} layers, and q and k of {len(self.heads)}"
