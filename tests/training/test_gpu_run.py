"""A run on a GPU: the same code in bf16, close to the CPU's fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megaconsa.model.loss import summed_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    "allocation",
    [{"source": "learn"}, {"source": "rule", "rule": "head-share"}],
    ids=["learn", "train"],
)
def test_bf16_follows_fp32(
    allocation: dict[str, Any],
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
    tmp_path: Any,
) -> None:
    runs = [
        train(
            make_config(
                run={"dir": str(tmp_path / precision)},
                allocation=allocation,
                training={"precision": precision, "steps": 30},
                gates={"warmup_steps": 15},
            )
        )
        for precision in ("fp32", "bf16")
    ]
    assert runs[0][-1]["loss"] < runs[0][0]["loss"] - 0.3
    for fp32, bf16 in zip(*runs, strict=True):
        assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.01)
        assert bf16["mfu"] is None or 0 < bf16["mfu"] < 1


def test_fused_loss_equals_plain() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 300, 64, device="cuda", requires_grad=True)
    weight = (torch.randn(5000, 64, device="cuda") * 0.05).requires_grad_()
    labels = torch.randint(0, 5000, (2, 300), device="cuda")
    labels[:, ::7] = -100
    fused = summed_cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(fused, (hidden, weight))
    logits = hidden.double() @ weight.double().T
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    truth = torch.autograd.grad(plain, (hidden, weight))
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    for gradient, true in zip(gradients, truth, strict=True):
        assert (gradient - true).norm() <= 1e-5 * true.norm()
