"""Cross-entropy in Triton: a program reads a row twice and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Below every logit. Not -inf, whose difference with itself is NaN in a lane that has seen no logit."""
BLOCK = 4096


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    """As `megaconsa.kernels.cross_entropy.cross_entropy_`."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            _cross_entropy[(rows,)](
                logits,
                labels,
                losses,
                vocab,
                ignored,
                GRADIENT=gradient,
                BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
                num_warps=8,
            )
    return losses


@triton.jit
def _cross_entropy(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    vocab: tl.tensor,
    ignored: tl.tensor,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * vocab
    column = tl.arange(0, BLOCK)
    if label == ignored:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                tl.store(row_ptr + start + column, 0.0, mask=start + column < vocab)
    else:
        target = tl.load(row_ptr + label).to(tl.float32)
        # Each lane has its own online softmax: they are joined once.
        maximum = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(row_ptr + start + column, mask=start + column < vocab, other=LOWEST).to(tl.float32)
            higher = tl.maximum(maximum, x)
            total = total * tl.exp(maximum - higher) + tl.exp(x - higher)
            maximum = higher
        highest = tl.max(maximum, axis=0)
        # A lane beyond a short row has counted LOWEST itself; it weighs nothing beside a logit.
        total = tl.sum(total * tl.exp(maximum - highest), axis=0)
        tl.store(losses_ptr + row, tl.log(total) + (highest - target))
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                inside = start + column < vocab
                x = tl.load(row_ptr + start + column, mask=inside, other=LOWEST).to(tl.float32)
                p = tl.exp(x - highest) / total - tl.where(start + column == label, 1.0, 0.0)
                tl.store(row_ptr + start + column, p.to(logits_ptr.dtype.element_ty), mask=inside)
