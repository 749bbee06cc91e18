"""The vocabulary divided over a tensor group: which rows each rank holds, and the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.model.loss import VocabularyPart
from megaconsa.model.weight_gradients import add_gradient, main_grad
from megaconsa.parallel.tensor_parallel import TensorParallel


def lookup(tokens: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's part of the embeddings, (B, S, hidden). The sum over ranks is the embedding.

    tokens: (B, S). Tokens of other ranks give zeros.
    """
    if tp.size == 1:
        return embed(tokens, weight)
    own = tokens - tp.rank * weight.shape[0]
    absent = (own < 0) | (own >= weight.shape[0])
    found = embed(own.masked_fill(absent, 0), weight)
    return found.masked_fill(absent[..., None], 0.0)


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of an embedding. Its gradient goes to `main_grad` if the weight has one."""
    if main_grad(weight) is None:
        return nn.functional.embedding(tokens, weight)
    found: Tensor = _Embedding.apply(tokens, weight)
    return found


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        rows = len(ctx.weight)
        # In fp32, because the rows of tokens that occur often are sums of many gradients.
        dense = torch.ops.aten.embedding_dense_backward(gradient.float(), tokens, rows, -1, False)
        add_gradient(ctx.weight, dense)
        return None, None


def part(weight: Tensor, tp: TensorParallel, vocab_size: int) -> VocabularyPart | None:
    """Which rows of the head this rank holds, None if it holds all. weight: (rows, hidden)."""
    if tp.size == 1:
        return None
    first = tp.rank * weight.shape[0]
    return VocabularyPart(first, max(0, min(weight.shape[0], vocab_size - first)), tp)
