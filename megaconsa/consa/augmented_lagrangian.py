"""The paper's augmented Lagrangian, which holds the expected sparsity at its target.

Adam updates both sides. The penalty of each constraint is

    lambda (rho_hat - rho) + phi (rho_hat - rho)^2

It is minimised over log_alpha and maximised over the multipliers lambda and phi.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam


class AugmentedLagrangian:
    """One Adam descends on log_alpha, another ascends on both multipliers.

    The descent follows the gradient of loss plus penalty. Both multipliers start at 0.
    """

    def __init__(self, log_alpha: Tensor, num_constraints: int) -> None:
        """log_alpha: the leaf to train, (layers, units)."""
        self.log_alpha = log_alpha
        self.lambda_, self.phi = torch.zeros(2, num_constraints, device=log_alpha.device).unbind()
        self._adam = _adam([log_alpha], (0.9, 0.999))
        self._ascent = _adam([self.lambda_, self.phi], (0.9, 0.999), maximize=True)
        self._learning_rate = 0.0

    def penalty(self, error: Tensor) -> Tensor:
        """Sum of the penalties of all constraints.

        error: (constraints,), expected minus target sparsity.

        Returns a scalar. Its gradient reaches log_alpha through error.
        """
        return (self.lambda_ * error + self.phi * error.square()).sum()

    def descend(
        self, loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float
    ) -> None:
        """One step on log_alpha. Both gradients have its shape."""
        self._learning_rate = learning_rate
        _step(self._adam, [loss_gradient + penalty_gradient], learning_rate)

    def ascend(self, error: Tensor) -> None:
        """One step on the multipliers, at the learning rate of the last `descend`."""
        # The penalty's gradient is error with respect to lambda, and error^2 with respect to phi.
        _step(self._ascent, [error, error.square()], self._learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs. These are the tensors themselves, not copies."""
        return {
            "lambda": self.lambda_,
            "phi": self.phi,
            **_moments("adam", self._adam),
            **_moments("ascent", self._ascent),
        }


def _adam(parameters: list[Tensor], betas: tuple[float, float], maximize: bool = False) -> Adam:
    """Adam whose moments already exist.

    Adam creates its moments in its first step, but a checkpoint may be loaded before that.
    """
    optimizer = Adam(parameters, betas=betas, maximize=maximize)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _step(optimizer: Adam, gradients: list[Tensor], learning_rate: float) -> None:
    (group,) = optimizer.param_groups
    group["lr"] = learning_rate
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _moments(prefix: str, optimizer: Adam) -> dict[str, Tensor]:
    """The optimizer's state by names such as "adam.0.exp_avg"."""
    moments: dict[str, Tensor] = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[parameter].items():
            moments[f"{prefix}.{index}.{key}"] = value
    return moments
