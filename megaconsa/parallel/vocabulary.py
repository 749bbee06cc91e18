"""The vocabulary divided over a tensor group: which rows a rank has, and the lookup of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.model.loss import VocabularyPart
from megaconsa.parallel.tensor import TensorParallel


def rows(vocab_size: int, size: int) -> int:
    """Rows of the embedding on each of `size` ranks; the last ranks' may be padding."""
    return -(-vocab_size // size)


def lookup(tokens: Tensor, weight: Tensor, tensor: TensorParallel) -> Tensor:
    """This rank's part of the embeddings (B, S, hidden): zeros for tokens (B, S) of other ranks. Their sum is the embedding."""
    own = tokens - tensor.rank * weight.shape[0]
    absent = (own < 0) | (own >= weight.shape[0])
    return torch.nn.functional.embedding(own.masked_fill(absent, 0), weight).masked_fill(
        absent[..., None], 0.0
    )


def part(weight: Tensor, tensor: TensorParallel, vocab_size: int) -> VocabularyPart | None:
    """Which rows of the head this rank's weight (rows, hidden) has; None if it has all."""
    if tensor.size == 1:
        return None
    first = tensor.rank * weight.shape[0]
    return VocabularyPart(first, max(0, min(weight.shape[0], vocab_size - first)), tensor)
