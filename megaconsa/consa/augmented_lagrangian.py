"""The paper's way of holding the expected sparsity at its target: an augmented Lagrangian, moved by Adam.

Penalty per constraint: lambda (rho_hat - rho) + phi (rho_hat - rho)^2, minimised over log_alpha, maximised over the multipliers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam


class AugmentedLagrangian:
    """One Adam over the gradient of loss plus penalty, and Adam's ascent on both multipliers, from 0."""

    def __init__(self, log_alpha: Tensor, num_constraints: int) -> None:
        """log_alpha: the leaf to train, (layers, units)."""
        self.log_alpha = log_alpha
        self.lambda_, self.phi = torch.zeros(2, num_constraints, device=log_alpha.device).unbind()
        self._adam = _adam([log_alpha], (0.9, 0.999))
        self._ascent = _adam([self.lambda_, self.phi], (0.9, 0.999), maximize=True)
        self._learning_rate = 0.0

    def penalty(self, error: Tensor) -> Tensor:
        """error: (constraints,), expected minus target sparsity. Returns a scalar; its gradient reaches log_alpha through error."""
        return (self.lambda_ * error + self.phi * error.square()).sum()

    def descend(
        self, loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float
    ) -> None:
        """One step on log_alpha; both gradients have its shape."""
        self._learning_rate = learning_rate
        _step(self._adam, [loss_gradient + penalty_gradient], learning_rate)

    def ascend(self, error: Tensor) -> None:
        """One step on the multipliers, at log_alpha's learning rate."""
        _step(self._ascent, [error, error.square()], self._learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs; the tensors themselves, not copies."""
        return {
            "lambda": self.lambda_,
            "phi": self.phi,
            **_moments("adam", self._adam),
            **_moments("ascent", self._ascent),
        }


def _adam(parameters: list[Tensor], betas: tuple[float, float], maximize: bool = False) -> Adam:
    """Adam with its moments in place, which it would create in its first step: a checkpoint may be loaded before that."""
    optimizer = Adam(parameters, betas=betas, maximize=maximize)
    for parameter in parameters:
        moments = {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
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
