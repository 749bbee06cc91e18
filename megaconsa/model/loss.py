"""Cross-entropy of the next token, with the output head inside so that all logits never exist together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megaconsa.kernels.cross_entropy.cross_entropy import (
    Softmax,
    cross_entropy_,
    gradient_,
    softmax_and_target,
)

IGNORED = -100
"""Label that counts neither in the loss nor among the tokens."""
ELSEWHERE = -1
"""Label whose row of the head is another rank's: negative too, and not IGNORED."""
CHUNK_BYTES = 2**30
"""Logits held at a time. A GPU multiplies well with the thousands of rows that these are."""


class Ranks(Protocol):
    """What ranks tell each other, in place and without gradients."""

    def sum(self, x: Tensor) -> Tensor: ...
    def maximum(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of a head that is divided over ranks: `rows` tokens from `first` on; what stands behind them is padding."""

    first: int
    rows: int
    ranks: Ranks


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None = None
) -> Tensor:
    """Sum over the labelled positions of -log p(label), in nats, fp32.

    hidden: (B, S, hidden) after the final norm; weight: (vocab, hidden) of the head; labels: (B, S) integers below vocab, or IGNORED.
    part: which rows of the head `weight` are, None for all. The sum is the same on every rank, the gradient of hidden a part of a sum.
    """
    total: Tensor = _SummedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), part)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, a chunk of tokens at a time: all logits would outweigh all other activations.

    Liger's fused loss does the same in chunks that shrink as the vocabulary outgrows the hidden size: 64 rows for Qwen3-0.6B.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if wanted else None
        step = max(1, CHUNK_BYTES // (weight.itemsize * weight.shape[0]))
        for chunk in (slice(start, start + step) for start in range(0, len(labels), step)):
            x = hidden[chunk]
            logits = x @ weight.T
            total += _losses_(logits, labels[chunk], part, gradient=wanted).sum()
            if d_hidden is not None and d_weight is not None:
                torch.mm(logits, weight, out=d_hidden[chunk])
                _add_product(d_weight, logits.T, x)
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        narrow = d_hidden.dtype
        # In fp32: the factor itself would lose up to 0.4 % in bf16, all of it in one direction.
        return (
            (d_hidden.float() * gradient).to(narrow),
            (d_weight * gradient).to(narrow),
            None,
            None,
        )


def _losses_(
    logits: Tensor, labels: Tensor, part: VocabularyPart | None, *, gradient: bool
) -> Tensor:
    """-log p(label) of each row, fp32 (N,); with `gradient` the logits become the gradient of the sum."""
    if part is None:
        return cross_entropy_(logits, labels, IGNORED, gradient=gradient)
    own = labels - part.first
    # In this order: another rank's label less `first` may be either number.
    own = own.masked_fill((own < 0) | (own >= part.rows), ELSEWHERE).masked_fill(
        labels == IGNORED, IGNORED
    )
    softmax, target = softmax_and_target(logits, own, IGNORED, part.rows)
    maximum = part.ranks.maximum(softmax.maximum.clone())
    total = softmax.total * (softmax.maximum - maximum).exp()
    total, target = part.ranks.sum(
        torch.stack((total, (target - maximum).masked_fill(own < 0, 0.0)))
    )
    if gradient:
        gradient_(logits, own, IGNORED, Softmax(maximum, total), part.rows)
    return (total.log() - target).masked_fill(labels == IGNORED, 0.0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32, also where a and b are narrower."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()
