"""Cross-entropy of rows of logits, whose memory becomes their gradient's."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    """-log p(label) of each row in nats, fp32 (N,); 0 where the label is `ignored`.

    logits: (N, vocab), contiguous; labels: (N,) integers. With `gradient` the logits are overwritten with softmax(row) - onehot(label),
    the gradient of the sum, and zeros in rows that are ignored. Everything between is fp32.
    """
    if logits.is_cuda:
        from megaconsa.kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy_(logits, labels, ignored, gradient=gradient)
    return _plain_(logits, labels, ignored, gradient=gradient)


def _plain_(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    labelled = labels != ignored
    own = labels.masked_fill(~labelled, 0)[:, None]
    log_p = logits.float().log_softmax(dim=1)
    losses = -log_p.gather(1, own)[:, 0].masked_fill(~labelled, 0.0)
    if gradient:
        d_logits = log_p.exp_().scatter_add_(1, own, -torch.ones_like(own, dtype=torch.float32))
        logits.copy_(d_logits.masked_fill_(~labelled[:, None], 0.0))
    return losses
