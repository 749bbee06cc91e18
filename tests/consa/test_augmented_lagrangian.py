"""The augmented Lagrangian: its penalty, and the steps on scores and multipliers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaconsa.consa.augmented_lagrangian import AugmentedLagrangian

BETAS = (0.9, 0.999)
RATES = (0.1, 0.1, 0.05, 0.02, 0.0)


def leaf(layers: int, units: int) -> Tensor:
    return torch.linspace(-1, 1, layers * units).reshape(layers, units).requires_grad_()


def gradients(count: int, seed: int) -> list[Tensor]:
    """Random gradients of shape (2, 3), of every size from 1e-4 to 10.

    Adam's step must not depend on the size of the gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    return [10.0 ** (index - 4) * torch.randn(2, 3, generator=generator) for index in range(count)]


def adam_steps(
    history: list[Tensor], betas: tuple[float, float], rates: tuple[float, ...]
) -> list[Tensor]:
    """What Adam (Kingma and Ba, algorithm 1) subtracts at each step, in double precision."""
    first, second = torch.zeros(2, dtype=torch.float64)
    steps = []
    for number, (gradient, rate) in enumerate(zip(history, rates, strict=True), 1):
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        steps.append(
            rate
            * first
            / (1 - betas[0] ** number)
            / ((second / (1 - betas[1] ** number)).sqrt() + 1e-8)
        )
    return steps


def test_penalty_and_its_gradient_follow_the_formula() -> None:
    lagrangian = AugmentedLagrangian(leaf(3, 4), 3)
    lagrangian.lambda_.copy_(torch.tensor([0.5, -2.0, 0.0]))
    lagrangian.phi.copy_(torch.tensor([1.0, 3.0, 10.0]))
    error = torch.tensor([0.2, -0.1, 0.4], requires_grad=True)
    penalty = lagrangian.penalty(error)
    assert penalty.item() == pytest.approx(
        0.5 * 0.2 + 0.2**2 + 2.0 * 0.1 + 3.0 * 0.1**2 + 10.0 * 0.4**2, rel=1e-6
    )
    expected = torch.tensor([0.5 + 2 * 0.2, -2.0 - 2 * 3.0 * 0.1, 2 * 10.0 * 0.4])
    torch.testing.assert_close(torch.autograd.grad(penalty, error)[0], expected, rtol=1e-6, atol=0)


def test_descent_is_one_adam_over_the_sum() -> None:
    log_alpha = leaf(2, 3)
    lagrangian = AugmentedLagrangian(log_alpha, 2)
    losses = gradients(5, seed=1)
    penalties = gradients(5, seed=2)[::-1]
    expected = log_alpha.detach().double()
    together = [loss + penalty for loss, penalty in zip(losses, penalties, strict=True)]
    for loss, penalty, rate, move in zip(
        losses, penalties, RATES, adam_steps(together, BETAS, RATES), strict=True
    ):
        lagrangian.descend(loss, penalty, rate)
        expected = expected - move
        torch.testing.assert_close(log_alpha.detach().double(), expected, rtol=0, atol=1e-6)


def test_descent_leaves_the_gradients_and_the_multipliers_alone() -> None:
    lagrangian = AugmentedLagrangian(leaf(2, 3), 2)
    (loss,) = gradients(1, seed=1)
    (penalty,) = gradients(1, seed=2)
    before = [tensor.clone() for tensor in (loss, penalty, lagrangian.lambda_, lagrangian.phi)]
    lagrangian.descend(loss, penalty, 0.1)
    assert all(map(torch.equal, (loss, penalty, lagrangian.lambda_, lagrangian.phi), before))
    assert lagrangian.log_alpha.grad is None


def test_ascent_is_adam_on_both_multipliers() -> None:
    """The ascent follows the gradient of the penalty.

    Both multipliers start at 0. The learning rate is that of the descent before.
    """
    lagrangian = AugmentedLagrangian(leaf(2, 3), 2)
    assert lagrangian.lambda_.tolist() == lagrangian.phi.tolist() == [0.0, 0.0]
    errors = [
        torch.tensor(values)
        for values in ([0.5, -0.25], [0.4, -0.3], [-0.1, 0.2], [0.3, 0.1], [0.0, 0.0])
    ]
    slopes = []
    for error in errors:
        multipliers = torch.zeros(2, 2, requires_grad=True)
        slopes.append(
            torch.autograd.grad(
                (multipliers[0] * error + multipliers[1] * error**2).sum(), multipliers
            )[0]
        )
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for error, rate, move in zip(errors, RATES, adam_steps(slopes, BETAS, RATES), strict=True):
        lagrangian.descend(torch.zeros(2, 3), torch.zeros(2, 3), rate)
        lagrangian.ascend(error)
        expected = expected + move
        torch.testing.assert_close(lagrangian.lambda_.double(), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lagrangian.phi.double(), expected[1], rtol=0, atol=1e-6)
    assert float(lagrangian.lambda_[0]) > 0 > float(lagrangian.lambda_[1])


def test_state_names_every_tensor() -> None:
    def moments(*names: str) -> set[str]:
        return {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}

    log_alpha = leaf(1, 4)
    assert AugmentedLagrangian(log_alpha, 1).state().keys() == {"lambda", "phi"} | moments(
        "adam.0", "ascent.0", "ascent.1"
    )


@pytest.mark.parametrize("at", [0, 1, 3])
def test_state_through_a_file_restores_bitwise_the_same_next_steps(at: int, tmp_path: Path) -> None:
    """A saved state resumes exactly, also before the first step.

    The tensors in the state stay the same objects, because loading copies into them.
    """

    def advance(lagrangian: AugmentedLagrangian, steps: range) -> None:
        for step in steps:
            lagrangian.descend(losses[step], penalties[step], RATES[step])
            lagrangian.ascend(losses[step][:, 0])

    losses = gradients(5, seed=1)
    penalties = gradients(5, seed=2)[::-1]
    lagrangian = AugmentedLagrangian(leaf(2, 3), 2)
    own = lagrangian.state()
    advance(lagrangian, range(at))
    save_file(
        lagrangian.state() | {"log_alpha": lagrangian.log_alpha.detach()},
        tmp_path / "gates.safetensors",
    )
    saved = load_file(tmp_path / "gates.safetensors")
    advance(lagrangian, range(at, 5))
    assert all(value is own[key] for key, value in lagrangian.state().items())

    resumed = AugmentedLagrangian(saved.pop("log_alpha").requires_grad_(), 2)
    for key, value in resumed.state().items():
        value.copy_(saved[key])
    advance(resumed, range(at, 5))
    states = [
        each.state() | {"log_alpha": each.log_alpha.detach()} for each in (lagrangian, resumed)
    ]
    for a, b in pairwise(states):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(states[0]["lambda"], saved["lambda"])
