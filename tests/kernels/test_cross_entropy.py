"""Cross-entropy and its gradient, compared with fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.kernels import limits
from megaconsa.kernels.cross_entropy import cross_entropy, triton
from megaconsa.kernels.cross_entropy.cross_entropy import cross_entropy_
from megaconsa.kernels.cross_entropy.softmax import Softmax

IGNORED = -100
CASES = pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (3, 7), (5, 64), (2, 4096), (3, 4097), (4, 10_001)]
)


def draw(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draws logits and labels.

    The logits are so far apart that exp overflows without subtracting a maximum. Every third row
    has no label.
    """
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (60 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = IGNORED
    return logits.to(device), labels.to(device)


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, labels, ignore_index=IGNORED, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def check(functions: tuple[Any, Any], logits: Tensor, labels: Tensor, tolerance: float) -> None:
    softmax_and_target, _ = functions
    losses, gradient = truth(logits, labels)
    for wanted in (False, True):
        found = logits.clone()
        softmax, target = softmax_and_target(
            found, labels, IGNORED, logits.shape[1], gradient=wanted
        )
        ours = (softmax.total.log() + (softmax.maximum - target)).masked_fill(
            labels == IGNORED, 0.0
        )
        torch.testing.assert_close(ours.double(), losses, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            found.double(), gradient if wanted else logits.double(), rtol=tolerance, atol=tolerance
        )


def check_parts(
    functions: tuple[Any, Any], logits: Tensor, labels: Tensor, tolerance: float, parts: int = 3
) -> None:
    """Divides the columns as over ranks and joins the partial results here.

    Columns behind the last one of the vocabulary are padding.
    """
    softmax_and_target, gradient_ = functions
    losses, gradient = truth(logits, labels)
    vocab = logits.shape[1]
    labelled = labels != IGNORED
    width = -(-vocab // parts)
    padded = torch.nn.functional.pad(logits, (0, width * parts - vocab), value=1000.0)
    pieces = [piece.contiguous() for piece in padded.split(width, dim=1)]
    columns = [max(0, min(width, vocab - width * part)) for part in range(parts)]
    own = [labels - width * part for part in range(parts)]
    for there, count in zip(own, columns, strict=True):
        there[(there < 0) | (there >= count)] = -1
        there[~labelled] = IGNORED
    found = [
        softmax_and_target(*each, gradient=False)
        for each in zip(pieces, own, [IGNORED] * parts, columns, strict=True)
    ]
    maximum = torch.stack([softmax.maximum for softmax, _ in found]).amax(0)
    total = torch.stack(
        [softmax.total * (softmax.maximum - maximum).exp() for softmax, _ in found]
    ).sum(0)
    target = torch.stack([target for _, target in found]).sum(0)
    ours = (total.log() + (maximum - target))[labelled]
    torch.testing.assert_close(ours.double(), losses[labelled], rtol=1e-6, atol=1e-5)
    for piece, there, count in zip(pieces, own, columns, strict=True):
        gradient_(piece, there, IGNORED, Softmax(maximum, total), count)
    whole = torch.cat(pieces, dim=1)
    torch.testing.assert_close(whole[:, :vocab].double(), gradient, rtol=tolerance, atol=tolerance)
    assert not whole[:, vocab:].any()


PLAIN = (cross_entropy._plain, cross_entropy._plain_gradient_)
TRITON = (triton.softmax_and_target, triton.gradient_)


@CASES
@pytest.mark.parametrize("checks", [check, check_parts])
def test_plain(rows: int, vocab: int, checks: Any) -> None:
    checks(PLAIN, *draw(rows, vocab, torch.float32), 1e-6)


@CASES
@pytest.mark.parametrize("checks", [check, check_parts])
@pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_interpreted(rows: int, vocab: int, checks: Any) -> None:
    checks(TRITON, *draw(rows, vocab, torch.float32), 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 7), (3, 4097), (300, 151_936)])
@pytest.mark.parametrize("checks", [check, check_parts])
def test_triton_on_a_gpu(rows: int, vocab: int, dtype: torch.dtype, checks: Any) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    checks(TRITON, *draw(rows, vocab, dtype, "cuda"), tolerance)


def test_the_sum_of_what_is_not_ignored() -> None:
    logits, labels = draw(5, 64, torch.float32)
    losses, _ = truth(logits, labels)
    torch.testing.assert_close(
        cross_entropy_(logits, labels, IGNORED, gradient=False).double(),
        losses,
        rtol=1e-6,
        atol=1e-5,
    )
