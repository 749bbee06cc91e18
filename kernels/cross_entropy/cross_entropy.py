"""Cross-entropy of rows of logits, which can overwrite the logits with their gradient.

The functions serve whole rows, and rows whose columns are sharded over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.kernels.cross_entropy.softmax import LOWEST, Softmax


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    """-log p(label) of each row in nats. Can overwrite the logits with their gradient.

    logits: (N, vocab), contiguous.
    labels: (N,) integers below vocab. The range is not checked.
    ignored: the label of rows that have no loss.
    gradient: whether to overwrite the logits with softmax(row) - onehot(label), which is the
        gradient of the sum of the results. Ignored rows get zeros.

    Returns fp32 (N,), 0 where the label is `ignored`. All intermediate values are fp32.
    """
    softmax, target = softmax_and_target(
        logits, labels, ignored, logits.shape[1], gradient=gradient
    )
    loss = softmax.total.log() + (softmax.maximum - target)
    return loss.masked_fill_(labels == ignored, 0.0)


def softmax_and_target(
    logits: Tensor, labels: Tensor, ignored: int, columns: int, *, gradient: bool = False
) -> tuple[Softmax, Tensor]:
    """The softmax of each row over its first `columns`, and the logit of its label.

    logits: (N, width).
    labels: (N,). The label is negative where its column is on another rank.
    ignored: the label of rows that have no loss, also a negative number.
    gradient: whether to overwrite the logits as `gradient_` does.

    Returns the softmax and the label's logit, fp32 (N,). The logit is 0 where the label is
    negative. The results of ignored rows have no meaning.
    """
    if logits.is_cuda:
        from megaconsa.kernels.cross_entropy import triton

        return triton.softmax_and_target(logits, labels, ignored, columns, gradient=gradient)
    return _plain(logits, labels, ignored, columns, gradient=gradient)


def gradient_(logits: Tensor, labels: Tensor, ignored: int, softmax: Softmax, columns: int) -> None:
    """Overwrite the logits with their columns of softmax(row) - onehot(label).

    Ignored rows, and the columns from `columns` on, get zeros.

    labels: (N,). A label whose column is on another rank is a negative number other than `ignored`.
    softmax: over all columns, those on other ranks included.
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
    total = (x - maximum[:, None]).exp_().sum(dim=1)
    softmax = Softmax(maximum, total)
    target = x.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0.0)
    if gradient:
        _plain_gradient_(logits, labels, ignored, softmax, columns)
    return softmax, target


def _plain_gradient_(
    logits: Tensor, labels: Tensor, ignored: int, softmax: Softmax, columns: int
) -> None:
    d_logits = _inside(logits, columns) - softmax.maximum[:, None]
    d_logits.exp_().div_(softmax.total[:, None])
    # A negative label subtracts 0 from column 0, so its row keeps the plain softmax.
    onehot_value = (labels >= 0).float()[:, None]
    d_logits.scatter_add_(1, labels.clamp(min=0)[:, None], -onehot_value)
    logits.copy_(d_logits.masked_fill_((labels == ignored)[:, None], 0.0))


def _inside(logits: Tensor, columns: int) -> Tensor:
    """The logits in fp32, with LOWEST in the columns from `columns` on."""
    if columns == logits.shape[1]:
        return logits.float()
    outside = torch.arange(logits.shape[1], device=logits.device) >= columns
    return logits.float().masked_fill(outside, LOWEST)
