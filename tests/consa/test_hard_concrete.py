"""The hard concrete distribution: its two probabilities, its samples, and their gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megaconsa.consa import hard_concrete, philox

LOG_ALPHAS = (-6.0, -2.5, -0.5, 0.0, 1.0, 2.5, 6.0)


def test_constants_are_those_of_the_paper() -> None:
    assert (hard_concrete.BETA, hard_concrete.GAMMA, hard_concrete.ZETA) == (2 / 3, -0.1, 1.1)


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_probabilities_against_monte_carlo(log_alpha: float) -> None:
    uniform = philox.uniform(3, 0, torch.arange(1 << 14), 4, 8)
    z = hard_concrete.sample(torch.tensor(log_alpha), uniform)
    for probability, share in (
        (hard_concrete.probability_nonzero, (z > 0).double().mean()),
        (hard_concrete.probability_one, (z == 1).double().mean()),
    ):
        p = float(probability(torch.tensor(log_alpha)))
        assert abs(float(share) - p) < 5 * math.sqrt(p * (1 - p) / z.numel())


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_samples_switch_at_the_quantiles(log_alpha: float) -> None:
    """z grows with u, so its switching points are known exactly.

    z > 0 begins at u = 1 - P(z > 0), and z = 1 begins at u = 1 - P(z = 1). This is sharper than any
    test by sampling.
    """
    value = torch.tensor(log_alpha, dtype=torch.float64)
    opens = 1 - hard_concrete.probability_nonzero(value)
    saturates = 1 - hard_concrete.probability_one(value)
    below = 1 - 1e-9
    above = 1 + 1e-9
    assert hard_concrete.sample(value, opens * below) == 0
    assert 0 < hard_concrete.sample(value, opens * above) < 1e-6
    assert 1 - 1e-6 < hard_concrete.sample(value, saturates * below) < 1
    assert hard_concrete.sample(value, 1 - (1 - saturates) * below) == 1


def test_sample_and_gradient_inside_follow_the_formula() -> None:
    log_alpha = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    uniform = torch.linspace(0.65, 0.35, 9, dtype=torch.float64)
    z = hard_concrete.sample(log_alpha, uniform)
    gradient = torch.autograd.grad(z.sum(), log_alpha)[0]
    for a, u, value, slope in zip(
        log_alpha.tolist(), uniform.tolist(), z.tolist(), gradient.tolist(), strict=True
    ):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
        assert 0 < value < 1
        assert value == pytest.approx(1.2 * s - 0.1, rel=1e-13)
        assert slope == pytest.approx(1.2 * s * (1 - s) * 1.5, rel=1e-13)


def test_exact_zeros_and_ones_occur_and_have_no_gradient() -> None:
    uniform = philox.uniform(0, 0, torch.arange(64), 4, 8)
    log_alpha = torch.zeros_like(uniform, requires_grad=True)
    z = hard_concrete.sample(log_alpha, uniform)
    gradient = torch.autograd.grad(z.sum(), log_alpha)[0]
    clamped = (z == 0) | (z == 1)
    assert bool((z == 0).any())
    assert bool((z == 1).any())
    assert bool((gradient[clamped] == 0).all())
    assert bool((gradient[~clamped] > 0).all())


def test_gradient_of_the_open_probability() -> None:
    log_alpha = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    p = hard_concrete.probability_nonzero(log_alpha)
    torch.testing.assert_close(
        torch.autograd.grad(p.sum(), log_alpha)[0], p * (1 - p), rtol=1e-13, atol=0
    )


def test_extreme_log_alpha_saturates_without_nan() -> None:
    """Covers the smallest and the largest uniform number that philox can give."""
    uniform = torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])
    for value in (-50.0, 50.0):
        log_alpha = torch.full((3,), value, requires_grad=True)
        z = hard_concrete.sample(log_alpha, uniform)
        assert z.tolist() == [float(value > 0)] * 3
        assert torch.autograd.grad(z.sum(), log_alpha)[0].tolist() == [0.0] * 3
