"""The summed cross-entropy, compared with its definition."""

from __future__ import annotations

import pytest
import torch

from megaconsa.model.loss import IGNORED, summed_cross_entropy


def test_loss_and_gradients_equal_the_definition() -> None:
    """Only labelled positions count. The loss is their sum, not their mean."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = labels[1, 0] = IGNORED
    loss = summed_cross_entropy(hidden, weight, labels)
    hidden_, weight_ = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden_ @ weight_.T
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for position in range(5):
            if (label := int(labels[row, position])) != IGNORED:
                row_logits = logits[row, position]
                expected = expected + row_logits.exp().sum().log() - row_logits[label]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for result, truth in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden_, weight_)),
        strict=True,
    ):
        torch.testing.assert_close(result, truth.float(), rtol=1e-5, atol=1e-6)
    loss = summed_cross_entropy(hidden, weight, labels)
    (hidden_gradient,) = torch.autograd.grad(loss, hidden)
    assert not hidden_gradient[labels == IGNORED].any()


def test_without_labels_there_is_no_loss() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.randn(7, 4), torch.full((1, 3), IGNORED))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_statistics_are_fp32_for_bf16_weights() -> None:
    """The loss of 4096 equal logits is log 4096, which bf16 would round to 8.3125."""
    hidden = torch.ones(1, 1, 8, dtype=torch.bfloat16)
    weight = torch.ones(4096, 8, dtype=torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, torch.zeros(1, 1, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8.317766, rel=1e-6)
