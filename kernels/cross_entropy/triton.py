"""Cross-entropy in Triton: one program reads a row twice and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaconsa.kernels.cross_entropy import softmax as plain
from megaconsa.kernels.cross_entropy.softmax import Softmax

LOWEST: tl.constexpr = tl.constexpr(plain.LOWEST)
BLOCK = 4096
"""Columns that a program loads at a time."""
LANE: tl.constexpr = tl.constexpr(8)
"""Neighbouring columns that share an online softmax: 16-bit logits that a thread loads at once."""


def softmax_and_target(
    logits: Tensor, labels: Tensor, ignored: int, columns: int, *, gradient: bool
) -> tuple[Softmax, Tensor]:
    """As `megaconsa.kernels.cross_entropy.cross_entropy.softmax_and_target`.

    With `gradient`, the same launch then does what `gradient_` does.
    """
    maximum, total, target = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    softmax = Softmax(maximum, total)
    _launch(logits, labels, ignored, columns, softmax, target, STATISTICS=True, GRADIENT=gradient)
    return softmax, target


def gradient_(logits: Tensor, labels: Tensor, ignored: int, softmax: Softmax, columns: int) -> None:
    """As `megaconsa.kernels.cross_entropy.cross_entropy.gradient_`."""
    nothing = softmax.total  # passed for the target, which is neither read nor written here
    _launch(logits, labels, ignored, columns, softmax, nothing, STATISTICS=False, GRADIENT=True)


def _launch(
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    columns: int,
    softmax: Softmax,
    target: Tensor,
    **modes: bool,
) -> None:
    rows, width = logits.shape
    if rows == 0:
        return
    block = max(LANE.value, min(BLOCK, triton.next_power_of_2(width)))
    with torch.cuda.device_of(logits):
        _cross_entropy[(rows,)](
            logits,
            labels,
            *softmax,
            target,
            width,
            columns,
            ignored,
            **modes,
            BLOCK=block,
            num_warps=8,
        )


@triton.jit
def _cross_entropy(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    target_ptr: tl.tensor,
    width: tl.tensor,
    columns: tl.tensor,
    ignored: tl.tensor,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * width
    column = tl.arange(0, BLOCK)
    if label == ignored:
        if STATISTICS:
            tl.store(maximum_ptr + row, 0.0)
            tl.store(total_ptr + row, 1.0)
            tl.store(target_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, width, BLOCK):
                tl.store(row_ptr + start + column, 0.0, mask=start + column < width)
    else:
        if STATISTICS:
            # Loaded before the reductions: their barriers separate this load from the gradient
            # that another warp writes to the same place.
            target = tl.load(row_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
            # Each lane has its own online softmax, which takes one exponential a block beside those
            # of the logits. The lanes are joined once, after the loop.
            lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None]
            lane_maximum = tl.full([BLOCK // LANE], LOWEST, tl.float32)
            lane_total = tl.zeros([BLOCK // LANE], tl.float32)
            for start in range(0, columns, BLOCK):
                x = tl.load(row_ptr + start + lane, mask=start + lane < columns, other=LOWEST).to(
                    tl.float32
                )
                higher = tl.maximum(lane_maximum, tl.max(x, axis=1))
                weights = tl.sum(tl.exp(x - higher[:, None]), axis=1)
                lane_total = lane_total * tl.exp(lane_maximum - higher) + weights
                lane_maximum = higher
            maximum = tl.max(lane_maximum, axis=0)
            # A lane beyond a short row has counted LOWEST itself. Its weight beside a logit is 0.
            total = tl.sum(lane_total * tl.exp(lane_maximum - maximum), axis=0)
            tl.store(maximum_ptr + row, maximum)
            tl.store(total_ptr + row, total)
            tl.store(target_ptr + row, target)
        else:
            maximum = tl.load(maximum_ptr + row)
            total = tl.load(total_ptr + row)
        if GRADIENT:
            inverse = 1.0 / total
            # From the end to the beginning: the end was read last, and may still be in the cache.
            for passed in range(0, width, BLOCK):
                start = (width - 1) // BLOCK * BLOCK - passed
                x = tl.load(
                    row_ptr + start + column, mask=start + column < columns, other=LOWEST
                ).to(tl.float32)
                p = tl.exp(x - maximum) * inverse - tl.where(start + column == label, 1.0, 0.0)
                tl.store(
                    row_ptr + start + column,
                    p.to(logits_ptr.dtype.element_ty),
                    mask=start + column < width,
                )
