"""Cross-entropy and its gradient against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.kernels import cross_entropy, triton_cross_entropy, triton_limits

IGNORED = -100
CASES = pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (5, 64), (2, 4096), (3, 4097), (4, 10_001)])


def draw(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits far enough apart for exp to overflow without a maximum; a row in three is not labelled."""
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (60 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = IGNORED
    return logits.to(device), labels.to(device)


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, labels, ignore_index=IGNORED, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def check(function: object, logits: Tensor, labels: Tensor, tolerance: float) -> None:
    losses, gradient = truth(logits, labels)
    kept = logits.clone()
    torch.testing.assert_close(function(kept, labels, IGNORED, gradient=False).double(), losses, rtol=1e-6, atol=1e-5)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(function(kept, labels, IGNORED, gradient=True).double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(kept.double(), gradient, rtol=tolerance, atol=tolerance)


@CASES
def test_plain(rows: int, vocab: int) -> None:
    check(cross_entropy._plain_, *draw(rows, vocab, torch.float32), 1e-6)


@CASES
@pytest.mark.skipif(not triton_limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_interpreted(rows: int, vocab: int) -> None:
    check(triton_cross_entropy.cross_entropy_, *draw(rows, vocab, torch.float32), 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 7), (3, 4097), (300, 151_936)])
def test_triton_on_a_gpu(rows: int, vocab: int, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    check(triton_cross_entropy.cross_entropy_, *draw(rows, vocab, dtype, "cuda"), tolerance)
