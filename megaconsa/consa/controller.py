"""The augmented Lagrangian that holds the expected sparsity at its target, and the two ways of taking a step on it.

Penalty per constraint: lambda (rho_hat - rho) + phi (rho_hat - rho)^2, minimised over log_alpha, maximised over the multipliers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam

DAMPED_RATE = 0.1
"""Plain ascent: lambda grows by this times the error of the expected sparsity, each step."""
DAMPED_PHI = 5.0
LOSS_BETAS = (0.9, 0.99)
CONSTRAINT_BETAS = (0.5, 0.99)
"""Less momentum: at beta1 = 0.9 log_alpha answers the multipliers ten steps late, and the pair oscillates."""


class DampedController:
    """lambda follows the error by plain gradient ascent, phi is constant; the loss and the penalty move log_alpha by an Adam each.

    Adam's ascent divides the error by its own size and goes on at a constant rate however small the error is: the multipliers wind up
    and the sparsity overshoots. Plain ascent tracks the target.

    One Adam over the sum of both gradients would divide the loss's by the penalty's size, which while the target rises is a hundred
    times larger and nearly the same for every unit: the sparsity arrives at the target with units that the loss has not told apart.

    The penalty is multiplied by the number of units under a constraint: rho_hat is a mean, so a unit's own pull would otherwise fade
    as units are added.
    """

    def __init__(self, log_alpha: Tensor, num_constraints: int) -> None:
        """log_alpha: the leaf to train, (layers, units)."""
        self.units = log_alpha.numel() // num_constraints
        self.log_alpha = log_alpha
        self.lambda_ = torch.zeros(num_constraints, device=log_alpha.device)
        self.phi = torch.full((num_constraints,), DAMPED_PHI, device=log_alpha.device)
        self._loss_adam = _adam([log_alpha], LOSS_BETAS)
        self._constraint_adam = _adam([log_alpha], CONSTRAINT_BETAS)

    def penalty(self, error: Tensor) -> Tensor:
        """error: (constraints,), expected minus target sparsity. Returns a scalar; its gradient reaches log_alpha through error."""
        return self.units * (self.lambda_ * error + self.phi * error.square()).sum()

    def descend(self, loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float) -> None:
        """One step on log_alpha; both gradients have its shape."""
        _step(self._loss_adam, [loss_gradient], learning_rate)
        _step(self._constraint_adam, [penalty_gradient], learning_rate)

    def ascend(self, error: Tensor) -> None:
        """One step on the multipliers."""
        self.lambda_ += DAMPED_RATE * error

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs; the controller's own, not copies."""
        return {
            "lambda": self.lambda_,
            "phi": self.phi,
            **_moments("loss", self._loss_adam),
            **_moments("constraint", self._constraint_adam),
        }


class PaperController:
    """As the paper has it: one Adam over the gradient of loss plus penalty, and Adam's ascent on both multipliers, from 0."""

    def __init__(self, log_alpha: Tensor, num_constraints: int) -> None:
        """log_alpha: the leaf to train, (layers, units)."""
        self.log_alpha = log_alpha
        self.lambda_, self.phi = torch.zeros(2, num_constraints, device=log_alpha.device).unbind()
        self._adam = _adam([log_alpha], (0.9, 0.999))
        self._ascent = _adam([self.lambda_, self.phi], (0.9, 0.999), maximize=True)
        self._learning_rate = 0.0

    def penalty(self, error: Tensor) -> Tensor:
        """As in DampedController, without its factor."""
        return (self.lambda_ * error + self.phi * error.square()).sum()

    def descend(self, loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        _step(self._adam, [loss_gradient + penalty_gradient], learning_rate)

    def ascend(self, error: Tensor) -> None:
        """At log_alpha's learning rate."""
        _step(self._ascent, [error, error.square()], self._learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {"lambda": self.lambda_, "phi": self.phi, **_moments("adam", self._adam), **_moments("ascent", self._ascent)}


def _adam(parameters: list[Tensor], betas: tuple[float, float], maximize: bool = False) -> Adam:
    """Adam with its moments in place, which it would create in its first step: a checkpoint may be loaded before that."""
    optimizer = Adam(parameters, betas=betas, maximize=maximize)
    for parameter in parameters:
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    return optimizer


def _step(optimizer: Adam, gradients: list[Tensor], learning_rate: float) -> None:
    (group,) = optimizer.param_groups
    group["lr"] = learning_rate
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _moments(prefix: str, optimizer: Adam) -> dict[str, Tensor]:
    return {
        f"{prefix}.{index}.{key}": value
        for index, parameter in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[parameter].items()
    }
