"""The most probable next tokens, found by the output head in place of a loss.

A forward pass of the engine then answers for several texts in any topology. The labels of the
carry mark the position of each text whose next token is wanted, and `sequences` numbers the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaconsa.model.loss import IGNORED, VocabularyPart

UNKNOWN = -1
"""Stands for a token that another rank finds."""


class NextTokens:
    """What the head of this rank finds. It is asked for during `collected` only."""

    def __init__(self) -> None:
        self._found: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return self._found is not None

    @contextmanager
    def collected(self, texts: int, device: torch.device) -> Iterator[Tensor]:
        """Yields (texts,) int64, which the passes inside the context fill. UNKNOWN at first."""
        self._found = torch.full((texts,), UNKNOWN, device=device)
        try:
            yield self._found
        finally:
            self._found = None

    def find(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        sequences: Tensor,
        part: VocabularyPart | None,
    ) -> Tensor:
        """Notes the token after each marked position. Of equal ones, it is the smallest id.

        hidden: (B, S, hidden) after the final norm.
        weight: (vocab, hidden), the output head, or its rows in `part`.
        labels: (B, S), IGNORED except at marked positions, of which a row has at most one.
        sequences: (B,), the number of each row's text.

        Returns 0 in place of a loss.
        """
        assert self._found is not None
        rows, positions = (labels != IGNORED).nonzero(as_tuple=True)
        if len(rows):
            logits = (hidden[rows, positions] @ weight.T).float()
            self._found[sequences[rows]] = _largest(logits, part)
        return torch.zeros((), device=hidden.device)


def _largest(logits: Tensor, part: VocabularyPart | None) -> Tensor:
    """The ids of the largest logits, (N,). logits: (N, rows of the head)."""
    if part is None:
        return logits.argmax(dim=1)
    logits[:, part.rows :] = -torch.inf
    values, ids = logits.max(dim=1)
    largest = part.ranks.all_reduce_max(values.clone())
    # The maximum of negative ids is the smallest id among the ranks that have the largest logit.
    no_id = torch.iinfo(torch.int64).min
    own = torch.where(values == largest, -(ids + part.first), no_id)
    return -part.ranks.all_reduce_max(own)
