"""The penalty, and the two ways of taking a step on it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaconsa.consa.controller import (
    CONSTRAINT_BETAS,
    DAMPED_PHI,
    DAMPED_RATE,
    LOSS_BETAS,
    DampedController,
    PaperController,
)

KINDS = (DampedController, PaperController)
PAPER_BETAS = (0.9, 0.999)
RATES = (0.1, 0.1, 0.05, 0.02, 0.0)

controllers = pytest.mark.parametrize("kind", KINDS, ids=["damped", "paper"])


def leaf(layers: int, units: int) -> Tensor:
    return torch.linspace(-1, 1, layers * units).reshape(layers, units).requires_grad_()


def gradients(count: int, seed: int) -> list[Tensor]:
    """Of every size from 1e-4 to 10, since Adam must not care."""
    generator = torch.Generator().manual_seed(seed)
    return [10.0 ** (index - 4) * torch.randn(2, 3, generator=generator) for index in range(count)]


def adam_steps(history: list[Tensor], betas: tuple[float, float], rates: tuple[float, ...]) -> list[Tensor]:
    """What Adam (Kingma and Ba, algorithm 1) subtracts at each step, in double precision."""
    first, second = torch.zeros(2, dtype=torch.float64)
    steps = []
    for number, (gradient, rate) in enumerate(zip(history, rates, strict=True), 1):
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        steps.append(rate * first / (1 - betas[0] ** number) / ((second / (1 - betas[1] ** number)).sqrt() + 1e-8))
    return steps


def test_penalty_and_its_gradient_follow_the_formula() -> None:
    controller = PaperController(leaf(3, 4), 3)
    controller.lambda_.copy_(torch.tensor([0.5, -2.0, 0.0]))
    controller.phi.copy_(torch.tensor([1.0, 3.0, 10.0]))
    error = torch.tensor([0.2, -0.1, 0.4], requires_grad=True)
    penalty = controller.penalty(error)
    assert penalty.item() == pytest.approx(0.5 * 0.2 + 0.2**2 + 2.0 * 0.1 + 3.0 * 0.1**2 + 10.0 * 0.4**2, rel=1e-6)
    expected = torch.tensor([0.5 + 2 * 0.2, -2.0 - 2 * 3.0 * 0.1, 2 * 10.0 * 0.4])
    torch.testing.assert_close(torch.autograd.grad(penalty, error)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("layers", "units", "constraints", "factor"), [(2, 8, 2, 8), (3, 8, 1, 24), (12, 1, 1, 12)])
def test_damped_penalty_counts_the_units_of_its_constraints(layers: int, units: int, constraints: int, factor: int) -> None:
    """So that a unit feels the same pull however many share the constraint."""
    controller = DampedController(leaf(layers, units), constraints)
    lambda_ = torch.tensor([0.5, -2.0])[:constraints]
    controller.lambda_.copy_(lambda_)
    error = torch.tensor([0.2, -0.1])[:constraints].requires_grad_()
    penalty = controller.penalty(error)
    assert penalty.item() == pytest.approx(factor * (lambda_ * error + DAMPED_PHI * error**2).sum().item(), rel=1e-6)
    expected = factor * (lambda_ + 2 * DAMPED_PHI * error.detach())
    torch.testing.assert_close(torch.autograd.grad(penalty, error)[0], expected, rtol=1e-6, atol=0)


def test_damped_descent_is_an_adam_for_each_gradient() -> None:
    """The two moves add up, each with betas and moments of its own."""
    log_alpha = leaf(2, 3)
    controller = DampedController(log_alpha, 2)
    losses, penalties = gradients(5, seed=1), gradients(5, seed=2)[::-1]
    expected = log_alpha.detach().double()
    moves = zip(adam_steps(losses, LOSS_BETAS, RATES), adam_steps(penalties, CONSTRAINT_BETAS, RATES), strict=True)
    for loss, penalty, rate, move in zip(losses, penalties, RATES, moves, strict=True):
        controller.descend(loss, penalty, rate)
        expected = expected - move[0] - move[1]
        torch.testing.assert_close(log_alpha.detach().double(), expected, rtol=0, atol=1e-6)


def test_damped_descent_does_not_weigh_the_loss_by_the_penaltys_size() -> None:
    """Where units differ only in a loss that is a thousand times smaller than the penalty, they part as if there were none."""
    apart = []
    for size in (0.0, 1.0):
        log_alpha = torch.zeros(1, 2, requires_grad=True)
        controller = DampedController(log_alpha, 1)
        for _ in range(20):
            controller.descend(torch.tensor([[-1e-3, 1e-3]]), torch.full((1, 2), size), 0.1)
        apart.append(float(log_alpha.detach()[0].diff().neg()))
    assert apart == pytest.approx([4.0, 4.0], rel=1e-3)  # 20 steps of 0.1, both ways


def test_paper_descent_is_one_adam_over_the_sum() -> None:
    log_alpha = leaf(2, 3)
    controller = PaperController(log_alpha, 2)
    losses, penalties = gradients(5, seed=1), gradients(5, seed=2)[::-1]
    expected = log_alpha.detach().double()
    together = [loss + penalty for loss, penalty in zip(losses, penalties, strict=True)]
    for loss, penalty, rate, move in zip(losses, penalties, RATES, adam_steps(together, PAPER_BETAS, RATES), strict=True):
        controller.descend(loss, penalty, rate)
        expected = expected - move
        torch.testing.assert_close(log_alpha.detach().double(), expected, rtol=0, atol=1e-6)


@controllers
def test_descent_leaves_the_gradients_and_the_multipliers_alone(kind: type[DampedController | PaperController]) -> None:
    controller = kind(leaf(2, 3), 2)
    (loss,), (penalty,) = gradients(1, seed=1), gradients(1, seed=2)
    before = [tensor.clone() for tensor in (loss, penalty, controller.lambda_, controller.phi)]
    controller.descend(loss, penalty, 0.1)
    assert all(map(torch.equal, (loss, penalty, controller.lambda_, controller.phi), before))
    assert controller.log_alpha.grad is None


def test_damped_ascent_is_plain_and_phi_stays() -> None:
    controller = DampedController(leaf(2, 4), 2)
    for error in ([0.5, -0.25], [0.125, 0.0]):
        controller.ascend(torch.tensor(error))
    torch.testing.assert_close(controller.lambda_, DAMPED_RATE * torch.tensor([0.625, -0.25]), rtol=1e-6, atol=0)
    assert controller.phi.tolist() == [DAMPED_PHI] * 2


def test_paper_ascent_is_adam_on_both_multipliers() -> None:
    """From the penalty's own gradient, from 0, at the learning rate of the descent before it."""
    controller = PaperController(leaf(2, 3), 2)
    assert controller.lambda_.tolist() == controller.phi.tolist() == [0.0, 0.0]
    errors = [torch.tensor(values) for values in ([0.5, -0.25], [0.4, -0.3], [-0.1, 0.2], [0.3, 0.1], [0.0, 0.0])]
    slopes = []
    for error in errors:
        multipliers = torch.zeros(2, 2, requires_grad=True)
        slopes.append(torch.autograd.grad((multipliers[0] * error + multipliers[1] * error**2).sum(), multipliers)[0])
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for error, rate, move in zip(errors, RATES, adam_steps(slopes, PAPER_BETAS, RATES), strict=True):
        controller.descend(torch.zeros(2, 3), torch.zeros(2, 3), rate)
        controller.ascend(error)
        expected = expected + move
        torch.testing.assert_close(controller.lambda_.double(), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(controller.phi.double(), expected[1], rtol=0, atol=1e-6)
    assert float(controller.lambda_[0]) > 0 > float(controller.lambda_[1])


def test_state_names_every_tensor() -> None:
    def moments(*names: str) -> set[str]:
        return {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}

    log_alpha = leaf(1, 4)
    assert DampedController(log_alpha, 1).state().keys() == {"lambda", "phi"} | moments("loss.0", "constraint.0")
    assert PaperController(log_alpha, 1).state().keys() == {"lambda", "phi"} | moments("adam.0", "ascent.0", "ascent.1")


@controllers
@pytest.mark.parametrize("at", [0, 1, 3])
def test_state_through_a_file_restores_bitwise_the_same_next_steps(
    kind: type[DampedController | PaperController], at: int, tmp_path: Path
) -> None:
    """Also before the first step. The tensors stay the same objects throughout, for loading copies into them."""

    def advance(controller: DampedController | PaperController, steps: range) -> None:
        for step in steps:
            controller.descend(losses[step], penalties[step], RATES[step])
            controller.ascend(losses[step][:, 0])

    losses, penalties = gradients(5, seed=1), gradients(5, seed=2)[::-1]
    controller = kind(leaf(2, 3), 2)
    own = controller.state()
    advance(controller, range(at))
    save_file(controller.state() | {"log_alpha": controller.log_alpha.detach()}, tmp_path / "gates.safetensors")
    saved = load_file(tmp_path / "gates.safetensors")
    advance(controller, range(at, 5))
    assert all(value is own[key] for key, value in controller.state().items())

    resumed = kind(saved.pop("log_alpha").requires_grad_(), 2)
    for key, value in resumed.state().items():
        value.copy_(saved[key])
    advance(resumed, range(at, 5))
    states = [each.state() | {"log_alpha": each.log_alpha.detach()} for each in (controller, resumed)]
    for a, b in pairwise(states):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(states[0]["lambda"], saved["lambda"])
