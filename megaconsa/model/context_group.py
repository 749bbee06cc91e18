"""What attention asks of the ranks that a sequence is divided over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention.head_pattern import HeadPattern


class ContextGroup(Protocol):
    """The ranks that divide the tokens of a sequence. `parallel/context_parallel.py` has them."""

    def own_part(self, x: Tensor) -> Tensor:
        """This rank's tokens: (B, S, ...) to (B, S / ranks, ...)."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: HeadPattern,
        documents: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Hybrid attention of this rank's queries to the whole sequence.

        q (B, S / ranks, heads, D), k and v: this rank's tokens.
        documents: (B, S), those of the whole sequence, or None.
        """


@dataclass(frozen=True)
class WholeSequence:
    """A sequence that is not divided."""

    def own_part(self, x: Tensor) -> Tensor:
        return x

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: HeadPattern,
        documents: Tensor | None,
        backend: str,
    ) -> Tensor:
        return hybrid_attention(
            q,
            k,
            v,
            window=pattern.windows,
            gate=pattern.gate,
            closed=pattern.closed,
            documents=documents,
            backend=backend,
        )
