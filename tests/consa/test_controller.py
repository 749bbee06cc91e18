"""The penalty and the two ways of moving its multipliers."""

from __future__ import annotations

import pytest
import torch

from megaconsa.consa.controller import DAMPED_PHI, DAMPED_RATE, DampedController, PaperController

CPU = torch.device("cpu")


def test_penalty_and_its_gradient_follow_the_formula() -> None:
    controller = PaperController(3, CPU, 0.1)
    controller.lambda_.copy_(torch.tensor([0.5, -2.0, 0.0]))
    controller.phi.copy_(torch.tensor([1.0, 3.0, 10.0]))
    error = torch.tensor([0.2, -0.1, 0.4], requires_grad=True)
    penalty = controller.penalty(error)
    assert penalty.item() == pytest.approx(0.5 * 0.2 + 0.2**2 + 2.0 * 0.1 + 3.0 * 0.1**2 + 10.0 * 0.4**2, rel=1e-6)
    expected = torch.tensor([0.5 + 2 * 0.2, -2.0 - 2 * 3.0 * 0.1, 2 * 10.0 * 0.4])
    torch.testing.assert_close(torch.autograd.grad(penalty, error)[0], expected, rtol=1e-6, atol=0)


def test_damped_penalty_counts_the_units_of_its_constraints() -> None:
    """So that a unit feels the same pull however many share the constraint."""
    controller = DampedController(2, 8, CPU)
    controller.lambda_.copy_(torch.tensor([0.5, -2.0]))
    error = torch.tensor([0.2, -0.1], requires_grad=True)
    expected = 8 * torch.tensor([0.5 + 2 * DAMPED_PHI * 0.2, -2.0 - 2 * DAMPED_PHI * 0.1])
    torch.testing.assert_close(torch.autograd.grad(controller.penalty(error), error)[0], expected, rtol=1e-6, atol=0)


def test_damped_ascent_is_plain_and_phi_stays() -> None:
    controller = DampedController(2, 4, CPU)
    for error in ([0.5, -0.25], [0.125, 0.0]):
        controller.ascend(torch.tensor(error))
    torch.testing.assert_close(controller.lambda_, DAMPED_RATE * torch.tensor([0.625, -0.25]), rtol=1e-6, atol=0)
    assert controller.phi.tolist() == [DAMPED_PHI] * 2


def test_paper_ascent_is_adam_on_both_multipliers() -> None:
    """From the penalty's own gradient, with moments that Adam makes itself."""
    controller = PaperController(2, CPU, 0.1)
    lambda_, phi = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([lambda_, phi], lr=0.1, maximize=True)
    assert controller.lambda_.tolist() == controller.phi.tolist() == [0.0, 0.0]
    for values in ([0.5, -0.25], [0.4, -0.3], [-0.1, 0.2], [0.0, 0.0]):
        error = torch.tensor(values)
        controller.ascend(error)
        adam.zero_grad()
        (lambda_ * error + phi * error.square()).sum().backward()
        adam.step()
        assert torch.equal(controller.lambda_, lambda_)
        assert torch.equal(controller.phi, phi)
    assert float(controller.lambda_[0]) > 0 > float(controller.lambda_[1])


def test_state_names_every_tensor() -> None:
    assert DampedController(1, 4, CPU).state().keys() == {"lambda", "phi"}
    moments = {f"{name}.{key}" for name in ("lambda", "phi") for key in ("step", "exp_avg", "exp_avg_sq")}
    assert PaperController(1, CPU, 0.1).state().keys() == {"lambda", "phi"} | moments
