"""Cross-entropy of the next token, with the output head inside so that a GPU never holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Label that counts neither in the loss nor among the tokens."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled positions of -log p(label), in nats, fp32.

    hidden: (B, S, hidden) after the final norm; weight: (vocab, hidden) of the head; labels: (B, S) integers, IGNORED left out.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if hidden.is_cuda:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # Logits in chunks, gradients at once: at a vocabulary of 151,936 they would outweigh all other activations.
        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)
        return fused(weight, hidden, labels).float()
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
