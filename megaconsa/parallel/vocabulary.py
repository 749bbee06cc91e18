"""The vocabulary divided over a tensor group: which rows each rank holds, and the embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.model.loss import VocabularyPart
from megaconsa.parallel.tensor_parallel import TensorParallel


def rows(vocab_size: int, size: int) -> int:
    """Rows of the embedding on each of `size` ranks. The last rank's may be padding."""
    return -(-vocab_size // size)


def lookup(tokens: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's part of the embeddings, (B, S, hidden). The sum over ranks is the embedding.

    tokens: (B, S). Tokens of other ranks give zeros.
    """
    own = tokens - tp.rank * weight.shape[0]
    absent = (own < 0) | (own >= weight.shape[0])
    found = torch.nn.functional.embedding(own.masked_fill(absent, 0), weight)
    return found.masked_fill(absent[..., None], 0.0)


def part(weight: Tensor, tp: TensorParallel, vocab_size: int) -> VocabularyPart | None:
    """Which rows of the head this rank holds, None if it holds all. weight: (rows, hidden)."""
    if tp.size == 1:
        return None
    first = tp.rank * weight.shape[0]
    return VocabularyPart(first, max(0, min(weight.shape[0], vocab_size - first)), tp)
