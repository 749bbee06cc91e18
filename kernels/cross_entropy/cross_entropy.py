"""Cross-entropy of rows of logits, whose memory becomes their gradient's; of whole rows, or of columns that ranks have a part of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e30
"""Below every logit. Not -inf, whose difference with itself is NaN."""


class Softmax(NamedTuple):
    """What a row's softmax needs beside the row, fp32 (N,) each."""

    maximum: Tensor
    total: Tensor
    """Sum of exp(x - maximum)."""


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    """-log p(label) of each row in nats, fp32 (N,); 0 where the label is `ignored`.

    logits: (N, vocab), contiguous; labels: (N,) integers below vocab, which nobody checks. With `gradient` the logits are overwritten with
    softmax(row) - onehot(label), the gradient of the sum, and zeros in rows that are ignored. Everything between is fp32.
    """
    softmax, target = softmax_and_target(
        logits, labels, ignored, logits.shape[1], gradient=gradient
    )
    return (softmax.total.log() + (softmax.maximum - target)).masked_fill_(labels == ignored, 0.0)


def softmax_and_target(
    logits: Tensor, labels: Tensor, ignored: int, columns: int, *, gradient: bool = False
) -> tuple[Softmax, Tensor]:
    """The softmax of each row of (N, width) logits over its first `columns`, and the logit of its label, fp32 (N,).

    The latter is 0 where the label is negative, as it is where it lies on another rank. In rows whose label is `ignored`, a negative
    number too, nothing of this means anything. With `gradient` the logits are overwritten as by `gradient_`.
    """
    if logits.is_cuda:
        from megaconsa.kernels.cross_entropy import triton

        return triton.softmax_and_target(logits, labels, ignored, columns, gradient=gradient)
    return _plain(logits, labels, ignored, columns, gradient=gradient)


def gradient_(logits: Tensor, labels: Tensor, ignored: int, softmax: Softmax, columns: int) -> None:
    """Overwrites logits with those columns of softmax(row) - onehot(label), and zeros from `columns` on and in ignored rows.

    softmax: of all columns, those on other ranks too; a label that lies there is a negative number other than `ignored`.
    """
    if logits.is_cuda:
        from megaconsa.kernels.cross_entropy import triton

        triton.gradient_(logits, labels, ignored, softmax, columns)
    else:
        _plain_gradient_(logits, labels, ignored, softmax, columns)


def _plain(
    logits: Tensor, labels: Tensor, ignored: int, columns: int, *, gradient: bool
) -> tuple[Softmax, Tensor]:
    x = _inside(logits, columns)
    maximum = x.amax(dim=1)
    softmax = Softmax(maximum, (x - maximum[:, None]).exp_().sum(dim=1))
    target = x.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0.0)
    if gradient:
        _plain_gradient_(logits, labels, ignored, softmax, columns)
    return softmax, target


def _plain_gradient_(
    logits: Tensor, labels: Tensor, ignored: int, softmax: Softmax, columns: int
) -> None:
    d_logits = (
        (_inside(logits, columns) - softmax.maximum[:, None]).exp_().div_(softmax.total[:, None])
    )
    d_logits.scatter_add_(1, labels.clamp(min=0)[:, None], -(labels >= 0).float()[:, None])
    logits.copy_(d_logits.masked_fill_((labels == ignored)[:, None], 0.0))


def _inside(logits: Tensor, columns: int) -> Tensor:
    """In fp32, without what stands in the columns behind."""
    if columns == logits.shape[1]:
        return logits.float()
    return logits.float().masked_fill(
        torch.arange(logits.shape[1], device=logits.device) >= columns, LOWEST
    )
