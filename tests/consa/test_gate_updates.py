"""The update of the gates: one step compared with one autograd graph, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaconsa.consa import hard_concrete, philox
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.consa.sampled_gates import GRADIENT_CLIPPING
from tests.support.gate_banks import (
    HEADS,
    KINDS,
    LAYERS,
    SEQUENCES,
    SETTINGS,
    backward,
    expected_sparsity,
    loss,
    name,
    sampled,
    sampler,
    spread,
)

Descent = tuple[Tensor, Tensor, float]
Spied = Callable[[GateBank], list[Descent]]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Records what a bank passes to its controller at each step.

    Each record holds the gradient of the loss, the gradient of the penalty, and the learning rate.
    """

    def spy(bank: GateBank) -> list[Descent]:
        calls: list[Descent] = []
        descend = sampler(bank).lagrangian.descend

        def record(loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float) -> None:
            calls.append((loss_gradient.clone(), penalty_gradient.clone(), learning_rate))
            descend(loss_gradient, penalty_gradient, learning_rate)

        monkeypatch.setattr(sampler(bank).lagrangian, "descend", record)
        return calls

    return spy


@sampled
@pytest.mark.parametrize("scale", [0.02, 0.5], ids=["small", "clipped"])
def test_updates_equal_one_graph(settings: GateSettings, scale: float, spied: Spied) -> None:
    """The bank equals one autograd graph.

    The graph holds loss, samples and penalty, and torch's own Adam steps on it. The bank
    accumulates micro-batches into leaves.
    """
    bank = spread(GateBank(settings))
    calls = spied(bank)
    log_alpha = sampler(bank).log_alpha.detach().clone().requires_grad_()
    adam = torch.optim.Adam([log_alpha], betas=(0.9, 0.999))
    constraints = LAYERS if settings.constraint.scope == "per_layer" else 1
    lambda_ = torch.zeros(constraints)
    phi = torch.zeros(constraints)
    ascent = torch.optim.Adam([lambda_, phi], betas=(0.9, 0.999), maximize=True)
    sequences = torch.arange(SEQUENCES)
    norms = []
    for step in (0, 1, 2, 17, 19):  # the learning rate falls in the last two
        target = settings.constraint.sparsity * min(1.0, (step + 1) / 3)
        uniform = philox.uniform(9, step, sequences, LAYERS, settings.constraint.units_per_layer)
        z = hard_concrete.sample(log_alpha, uniform)
        error = expected_sparsity(log_alpha, settings) - target
        penalty = (lambda_ * error + phi * error**2).sum()

        def gate(layer: int, rows: Tensor, z: Tensor = z) -> Tensor:
            return z[rows, layer].expand(-1, HEADS)

        whole = loss(gate, sequences, scale) + penalty
        (penalty_gradient,) = torch.autograd.grad(penalty, log_alpha, retain_graph=True)
        loss_gradient = torch.autograd.grad(whole, log_alpha)[0] - penalty_gradient
        norm = float(loss_gradient.norm())
        norms.append(norm)
        loss_gradient /= max(1.0, norm / GRADIENT_CLIPPING)
        adam.param_groups[0]["lr"] = sampler(bank).rate(step)
        log_alpha.grad = loss_gradient + penalty_gradient
        adam.step()
        error = expected_sparsity(log_alpha.detach(), settings) - target
        ascent.param_groups[0]["lr"] = sampler(bank).rate(step)
        lambda_.grad = error
        phi.grad = error**2
        ascent.step()

        bank.sample(step)
        backward(bank, [[4, 1], [0], [5, 3, 2]], scale)
        metrics = bank.update()
        torch.testing.assert_close(calls[-1][0], loss_gradient, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(calls[-1][1], penalty_gradient, rtol=1e-5, atol=2e-6)
        assert calls[-1][2] == sampler(bank).rate(step)
        torch.testing.assert_close(sampler(bank).log_alpha, log_alpha, rtol=0, atol=5e-6)
        torch.testing.assert_close(sampler(bank).lagrangian.lambda_, lambda_, rtol=0, atol=5e-6)
        torch.testing.assert_close(sampler(bank).lagrangian.phi, phi, rtol=0, atol=5e-6)
        assert metrics["gate_grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["penalty"] == pytest.approx(penalty.item(), rel=1e-5, abs=1e-6)
    assert (max(norms) < GRADIENT_CLIPPING) if scale == 0.02 else (min(norms) > GRADIENT_CLIPPING)


@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_without_a_loss_only_the_penalty_has_a_gradient(
    settings: GateSettings, spied: Spied
) -> None:
    """The gradient is (lambda + 2 phi error) d error / d log_alpha.

    Here d error = -p (1 - p) / units.
    """
    bank = spread(GateBank(settings))
    calls = spied(bank)
    sampler(bank).lagrangian.lambda_.copy_(
        torch.linspace(0.01, 0.02, len(sampler(bank).lagrangian.lambda_))
    )
    sampler(bank).lagrangian.phi.fill_(0.7)
    before = sampler(bank).log_alpha.detach().clone()
    error = expected_sparsity(before, settings) - settings.constraint.sparsity / 3
    p = torch.sigmoid(before - (2 / 3) * math.log(0.1 / 1.1))
    slope = sampler(bank).lagrangian.lambda_ + 2 * 0.7 * error
    bank.sample(0)
    assert bank.update()["gate_grad_norm"] == 0
    ((loss_gradient, penalty_gradient, _),) = calls
    assert not loss_gradient.any()  # clipping must not turn a norm of 0 into NaN
    expected = -slope[:, None] * p * (1 - p) / settings.constraint.units
    torch.testing.assert_close(penalty_gradient, expected, rtol=1e-5, atol=1e-8)
    assert bool(sampler(bank).log_alpha.isfinite().all())


@sampled
def test_only_the_losss_gradient_is_clipped(settings: GateSettings, spied: Spied) -> None:
    bank = spread(GateBank(settings))
    calls = spied(bank)
    sampler(bank).lagrangian.lambda_.fill_(1e4)
    bank.sample(0)
    backward(bank, [range(SEQUENCES)], scale=50.0)
    metrics = bank.update()
    ((loss_gradient, penalty_gradient, _),) = calls
    assert metrics["gate_grad_norm"] > 2 * GRADIENT_CLIPPING
    assert float(loss_gradient.norm()) == pytest.approx(GRADIENT_CLIPPING, rel=1e-5)
    assert float(penalty_gradient.norm()) > 2 * GRADIENT_CLIPPING


def test_clipping_keeps_the_direction_and_comes_after_the_sum_over_ranks(spied: Spied) -> None:
    """The shares of two ranks are each below the limit, and their sum is above it."""
    plain = spread(GateBank(SETTINGS))
    plain.sample(0)
    backward(plain, [range(SEQUENCES)])
    norm = plain.update()["gate_grad_norm"]
    assert norm < GRADIENT_CLIPPING
    factor = 1 + GRADIENT_CLIPPING / norm

    bank = spread(GateBank(SETTINGS))
    calls = spied(bank)
    bank.sample(0)
    backward(bank, [range(SEQUENCES)])
    metrics = bank.update(lambda gradient: gradient.mul_(factor))
    assert metrics["gate_grad_norm"] == pytest.approx(norm + GRADIENT_CLIPPING, rel=1e-5)
    assert float(calls[0][0].norm()) == pytest.approx(GRADIENT_CLIPPING, rel=1e-5)
