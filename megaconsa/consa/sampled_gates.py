"""Gates as in the paper: sampled from the hard concrete distribution and trained by gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaconsa.consa import hard_concrete, philox
from megaconsa.consa.augmented_lagrangian import AugmentedLagrangian
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gate_settings import DECAY_SHARE

GRADIENT_CLIPPING = 1.0
"""Largest norm of the loss's gradient in log_alpha. It is clipped separately from the model's."""


class SampledGates:
    """log_alpha and the Lagrangian that holds the expected sparsity at the target.

    log_alpha is fp32, (layers, units).
    """

    def __init__(
        self,
        constraint: Constraint,
        *,
        initial: float,
        learning_rate: float,
        seed: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self.constraint = constraint
        self.learning_rate = learning_rate
        self.seed = seed
        self.steps = steps
        self.log_alpha = torch.full(
            constraint.shape, initial, dtype=torch.float32, device=device, requires_grad=True
        )
        self.lagrangian = AugmentedLagrangian(self.log_alpha, constraint.count)
        self._sampled: Tensor | None = None

    def rate(self, step: int) -> float:
        """Learning rate of log_alpha at an optimizer step (from 0)."""
        return self.learning_rate * min(1.0, (self.steps - step) / (DECAY_SHARE * self.steps))

    def draw(self, step: int, target: float, sequences: int) -> Tensor:
        """Draws one sample of every gate for each sequence of the step.

        target: the step's sparsity. It is unused here, but `EvidenceGates.draw` needs it.
        sequences: their number in the global batch.

        Returns fp32 (sequences, layers, units).
        """
        indices = torch.arange(sequences, device=self.log_alpha.device)
        uniform = philox.uniform(self.seed, step, indices, *self.constraint.shape)
        # `update` backpropagates through this sample, so its graph is kept.
        self._sampled = hard_concrete.sample(self.log_alpha, uniform)
        return self._sampled.detach()

    def update(self, gradient: Tensor, step: int, target: float) -> dict[str, Any]:
        """Takes one optimizer step on log_alpha, then one ascent step on the multipliers.

        gradient: (sequences, layers, units), the loss's gradient in the samples of the last `draw`,
            on any device.
        target: the step's sparsity.

        Returns the metrics that only sampled gates have.
        """
        assert self._sampled is not None
        of_samples = gradient.to(self._sampled.device)
        (loss_gradient,) = torch.autograd.grad(self._sampled, self.log_alpha, of_samples)
        self._sampled = None
        norm = torch.linalg.vector_norm(loss_gradient)
        loss_gradient *= (GRADIENT_CLIPPING / norm).clamp(max=1)
        penalty = self.lagrangian.penalty(self._expected() - target)
        (penalty_gradient,) = torch.autograd.grad(penalty, self.log_alpha)
        self.lagrangian.descend(loss_gradient, penalty_gradient, self.rate(step))
        with torch.no_grad():
            # The ascent uses the error after the descent.
            # Alternating instead of simultaneous steps damp the pair's oscillation.
            self.lagrangian.ascend(self._expected() - target)
        at_threshold = self.log_alpha.detach() > 0
        return {
            "threshold_sparsity": 1 - float(at_threshold.float().mean()),
            "multipliers": {
                "lambda": self.lagrangian.lambda_.tolist(),
                "phi": self.lagrangian.phi.tolist(),
            },
            "penalty": penalty.item(),
            "gate_grad_norm": norm.item(),
        }

    def is_deciding(self, step: int) -> bool:
        """Whether units stop being measured because of their evidence. Never the case here."""
        return False

    @property
    def scores(self) -> Tensor:
        """The values that the table is cut by, (layers, units)."""
        return self.log_alpha.detach()

    @property
    def open_probability(self) -> Tensor:
        """P(z > 0), (layers, units)."""
        return hard_concrete.probability_nonzero(self.log_alpha.detach())

    @property
    def decided_probability(self) -> Tensor:
        """The larger of P(z = 0) and P(z = 1), (layers, units)."""
        closed = 1 - self.open_probability
        return torch.maximum(closed, hard_concrete.probability_one(self.log_alpha.detach()))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs. These are the gates' own tensors, not copies."""
        return {"log_alpha": self.log_alpha.detach()} | self.lagrangian.state()

    def _expected(self) -> Tensor:
        """Expected sparsity of each constraint, (constraints,), with a gradient."""
        return self.constraint.sparsities(hard_concrete.probability_nonzero(self.log_alpha))
