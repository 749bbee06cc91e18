"""The augmented Lagrangian that holds the expected sparsity at its target, and the two ways of moving its multipliers.

Penalty per constraint: lambda (rho_hat - rho) + phi (rho_hat - rho)^2, minimised over log_alpha, maximised over the multipliers.
Adam divides the constraint's error by its own size, so that ascent goes on at a constant rate however small the error is: the
multipliers wind up and the sparsity overshoots. Plain ascent with a constant phi tracks the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPED_RATE = 0.04
"""Plain ascent: lambda grows by this times the error of the expected sparsity, each step."""
DAMPED_PHI = 5.0


class DampedController:
    """lambda follows the error by plain gradient ascent; phi is constant.

    The penalty is multiplied by the number of units under a constraint: rho_hat is a mean, so a unit's own pull would otherwise
    fade as units are added, and a constraint over 224 heads would follow its target 28 times slower than one over 8.
    """

    def __init__(self, num_constraints: int, units: int, device: torch.device) -> None:
        """units: gated units under each constraint."""
        self.units = units
        self.lambda_ = torch.zeros(num_constraints, device=device)
        self.phi = torch.full((num_constraints,), DAMPED_PHI, device=device)

    def penalty(self, error: Tensor) -> Tensor:
        """error: (constraints,), expected minus target sparsity. Returns a scalar; its gradient reaches log_alpha through error."""
        return self.units * (self.lambda_ * error + self.phi * error.square()).sum()

    def ascend(self, error: Tensor) -> None:
        self.lambda_ += DAMPED_RATE * error

    def state(self) -> dict[str, Tensor]:
        return {"lambda": self.lambda_, "phi": self.phi}


class PaperController(DampedController):
    """Adam's ascent on both multipliers, which start at 0; the penalty is the paper's, without a factor."""

    def __init__(self, num_constraints: int, device: torch.device, learning_rate: float) -> None:
        super().__init__(num_constraints, 1, device)
        self.phi.zero_()
        self.optimizer = torch.optim.Adam([self.lambda_, self.phi], lr=learning_rate, maximize=True)
        # Adam creates its moments in its first step; without a gradient there is none, so make them where a checkpoint can find them.
        for multiplier in (self.lambda_, self.phi):
            self.optimizer.state[multiplier] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(multiplier),
                "exp_avg_sq": torch.zeros_like(multiplier),
            }

    def ascend(self, error: Tensor) -> None:
        self.lambda_.grad, self.phi.grad = error.clone(), error.square()
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        moments = {
            f"{name}.{key}": value
            for name, multiplier in (("lambda", self.lambda_), ("phi", self.phi))
            for key, value in self.optimizer.state[multiplier].items()
        }
        return super().state() | moments
