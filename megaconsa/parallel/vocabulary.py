"""The vocabulary divided over a tensor group: lookup of embeddings, and cross-entropy without a whole row of logits anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaconsa.model.loss import IGNORED, scaled
from megaconsa.parallel.tensor import TensorParallel

CHUNK_BYTES = 2**29
"""fp32 logits held at a time."""


def rows(vocab_size: int, size: int) -> int:
    """Rows of the embedding on each of `size` ranks; the last ranks' may be padding."""
    return -(-vocab_size // size)


def lookup(tokens: Tensor, weight: Tensor, tensor: TensorParallel) -> Tensor:
    """This rank's part of the embeddings (B, S, hidden): zeros for tokens (B, S) of other ranks. Their sum is the embedding."""
    own = tokens - tensor.rank * weight.shape[0]
    absent = (own < 0) | (own >= weight.shape[0])
    return torch.nn.functional.embedding(own.masked_fill(absent, 0), weight).masked_fill(absent[..., None], 0.0)


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, tensor: TensorParallel, vocab_size: int) -> Tensor:
    """`megaconsa.model.loss.summed_cross_entropy` with the head's weight divided by rows; the same value on every rank.

    hidden: (B, S, hidden), whole, through `tensor.enter`: its gradient here is this rank's part of a sum. weight: (rows, hidden).
    """
    total: Tensor = _SummedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), tensor, vocab_size)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, a chunk of tokens at a time: all logits would outweigh all other activations."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tensor: TensorParallel, vocab_size: int) -> Tensor:
        first = tensor.rank * weight.shape[0]
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if wanted else None
        step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for chunk in (slice(start, start + step) for start in range(0, len(labels), step)):
            x, own = hidden[chunk], (labels[chunk] - first)[:, None]
            labelled = (labels[chunk] != IGNORED)[:, None]
            mine = labelled & (own >= 0) & (own < weight.shape[0])
            own = own.masked_fill(~mine, 0)
            logits = (x @ weight.T).float()
            logits[:, max(0, vocab_size - first) :] = -torch.inf  # rows of padding
            logits -= tensor.maximum(logits.amax(1, keepdim=True))
            target = logits.gather(1, own).masked_fill_(~mine, 0.0)
            weights = logits.exp_()
            normalizer, target = tensor.sum(torch.stack((weights.sum(1, keepdim=True), target)))
            total += (normalizer.log() - target).masked_fill(~labelled, 0.0).sum()
            if d_hidden is not None and d_weight is not None:
                d_logits = weights.div_(normalizer).scatter_add_(1, own, -mine.float())
                narrow = d_logits.masked_fill_(~labelled, 0.0).to(x.dtype)
                torch.mm(narrow, weight, out=d_hidden[chunk])
                d_weight += narrow.T @ x
        if d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return *scaled(d_hidden, d_weight, gradient), None, None, None
