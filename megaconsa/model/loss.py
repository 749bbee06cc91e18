"""Cross-entropy of the next token. It includes the output head, so all logits never coexist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megaconsa.kernels.cross_entropy.cross_entropy import (
    cross_entropy_,
    gradient_,
    softmax_and_target,
)
from megaconsa.kernels.cross_entropy.softmax import Softmax
from megaconsa.model.flops import LOGIT_CHUNK_BYTES
from megaconsa.model.weight_gradients import add_product, main_grad, note_added

IGNORED = -100
"""Label that counts neither in the loss nor among the tokens."""
ELSEWHERE = -1
"""Label whose row of the head is on another rank. It is negative too, and differs from IGNORED."""


class Ranks(Protocol):
    """All-reduces over ranks, in place and without gradients."""

    def all_reduce(self, x: Tensor) -> Tensor: ...
    def all_reduce_max(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VocabularyPart:
    """This rank's rows of an output head that is sharded over ranks.

    first: the token id of the first row.
    rows: the number of rows that are tokens. Rows after them are padding.
    ranks: the ranks that share the head.
    """

    first: int
    rows: int
    ranks: Ranks


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None = None
) -> Tensor:
    """Sum over the labelled positions of -log p(label), in nats.

    hidden: (B, S, hidden) after the final norm.
    weight: (vocab, hidden), the output head.
    labels: (B, S) integers below vocab, or IGNORED.
    part: which rows of the head `weight` holds, or None for all rows.

    Returns an fp32 scalar. The sum is the same on every rank. The gradient of hidden is this rank's
    part of a sum over ranks.
    """
    if not torch.is_grad_enabled():
        # The function computes gradients together with the loss, wherever an input asks for them.
        hidden = hidden.detach()
        weight = weight.detach()
    total: Tensor = _SummedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), part)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, one chunk of tokens at a time.

    The logits of all tokens would need more memory than all other activations.

    Liger's fused loss does the same. Its chunks shrink as the vocabulary outgrows the hidden size:
    they have 64 rows for Qwen3-0.6B.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            # The chunks' products add up in fp32, see `add_product`.
            d_weight = torch.zeros(weight.shape, device=weight.device)
        rows = max(1, LOGIT_CHUNK_BYTES // (weight.itemsize * weight.shape[0]))
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            x = hidden[chunk]
            logits = x @ weight.T
            total += _losses_(logits, labels[chunk], part, gradient=wanted).sum()
            # With gradients, `logits` was overwritten with its gradient.
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                add_product(d_weight, logits.T, x)
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight = weight
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        narrow = d_hidden.dtype
        # The product is taken in fp32. bf16 would round the factor itself by up to 0.4 %, which
        # shifts every element in the same direction.
        d_hidden = (d_hidden.float() * gradient).to(narrow)
        if d_weight is None:
            return d_hidden, None, None, None
        buffer = main_grad(ctx.weight)
        if buffer is None:
            d_weight = (d_weight * gradient).to(narrow)
        else:
            buffer.addcmul_(d_weight, gradient)
            note_added(ctx.weight)
            d_weight = None
        return d_hidden, d_weight, None, None


def _losses_(
    logits: Tensor, labels: Tensor, part: VocabularyPart | None, *, gradient: bool
) -> Tensor:
    """-log p(label) of each row, fp32 (N,).

    With `gradient`, the logits are overwritten with the gradient of the sum.
    """
    if part is None:
        return cross_entropy_(logits, labels, IGNORED, gradient=gradient)
    # Labels as rows of this rank's part. Another rank's label may equal ELSEWHERE or IGNORED by
    # chance after the subtraction. So all labels outside the part become ELSEWHERE first, and the
    # ignored ones are restored afterwards.
    own = labels - part.first
    own = own.masked_fill((own < 0) | (own >= part.rows), ELSEWHERE)
    own = own.masked_fill(labels == IGNORED, IGNORED)
    softmax, target = softmax_and_target(logits, own, IGNORED, part.rows)
    # Combine the parts' softmaxes, relative to the maximum over all ranks.
    maximum = part.ranks.all_reduce_max(softmax.maximum.clone())
    total = softmax.total * (softmax.maximum - maximum).exp()
    # Only the rank that has the label's row contributes its logit.
    target = (target - maximum).masked_fill(own < 0, 0.0)
    # One all-reduce for both.
    total, target = part.ranks.all_reduce(torch.stack((total, target)))
    if gradient:
        gradient_(logits, own, IGNORED, Softmax(maximum, total), part.rows)
    return (total.log() - target).masked_fill(labels == IGNORED, 0.0)
