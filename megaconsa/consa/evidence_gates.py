"""Gates as learned by default: without noise, they measure first and decide afterwards.

All units start at z = 1. While the target rises, and until the closing stage, every gate of a
constraint has the same value z = 1 - target. All units are thus measured under equal conditions. A
gradient at z = 0.9 could not be compared with one at z = 0.1.

The closing stage decides the units one after another, those with the clearest evidence first. A
decided gate moves to exactly 0 or 1. The others share the value that keeps the mean at the target,
and are still measured. The order is recomputed in each step, so a unit can come back. At the end
all gates are 0 or 1, as in the finished table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.consa.evidence import Evidence
from megaconsa.consa.gate_settings import CLOSING_SHARE

SETTLED_SHARE = 0.05
"""Last part of a run, in which all units are decided. The weights train with the finished table."""
TRANSITION = 0.25
"""Share of a constraint's units that are moving to 0 or 1 at the same time."""


class EvidenceGates:
    """z as a function of the evidence and the step alone.

    There is nothing to train, and no multiplier that could wind up.
    """

    def __init__(self, constraint: Constraint, evidence: Evidence, steps: int) -> None:
        """steps: optimizer steps of the whole run."""
        self.constraint = constraint
        self.evidence = evidence
        self.steps = steps
        self.z = torch.ones(constraint.shape, dtype=torch.float64)

    def draw(self, step: int, target: float, sequences: int) -> Tensor:
        """Gates of a step, the same for each sequence.

        target: the step's sparsity, which the mean of z meets exactly in every constraint.
        sequences: their number in the global batch.

        Returns fp32 (sequences, layers, units) on the CPU.
        """
        decided = self.constraint.rows(self._decided(step))
        table = self.constraint.top_k(self.evidence.scores)
        ends = self.constraint.rows(table).double()
        wanted = (1 - target) * self.constraint.units
        # Undecided units share the rest of the target equally.
        left = wanted - (decided * ends).sum(dim=1, keepdim=True)
        undecided = (1 - decided).sum(dim=1, keepdim=True)
        # The lower bound avoids a division by zero once every unit is decided.
        common = (left / undecided.clamp(min=1e-12)).clamp(0, 1)
        z = decided * ends + (1 - decided) * common
        self.z = z.reshape(self.constraint.shape)
        return self.z.float().expand(sequences, -1, -1)

    def is_deciding(self, step: int) -> bool:
        """Whether units stop being measured because of their evidence, as in the closing stage."""
        return self._progress(step) > 0

    def _progress(self, step: int) -> float:
        """Progress of the closing stage: 0 before it, 1 once all units are decided."""
        begin = (1 - CLOSING_SHARE) * self.steps
        # Even in a short run, all units are decided by the last step.
        end = min((1 - SETTLED_SHARE) * self.steps, self.steps - 1)
        if step >= end:
            return 1.0
        if step <= begin:
            return 0.0
        return (step - begin) / (end - begin)

    def _decided(self, step: int) -> Tensor:
        """How far each unit has moved from the common value (0) to its end (1).

        Returns fp64 (layers, units).
        """
        progress = self._progress(step)
        if progress == 1:
            return torch.ones(self.constraint.shape, dtype=torch.float64)
        clarity = self.constraint.rows(self.evidence.z_scores.abs())
        order = clarity.argsort(dim=1, descending=True, stable=True)
        # Sorting the order again gives each unit its rank among those of its constraint.
        # The turn is this rank, scaled into (0, 1).
        turn = (order.argsort(dim=1).double() + 0.5) / self.constraint.units
        begun = (1 + TRANSITION) * progress - turn
        return (begun / TRANSITION).clamp(0, 1).reshape(self.constraint.shape)

    def update(self, gradient: Tensor, step: int, target: float) -> dict[str, Any]:
        """Returns the metrics that only evidence gates have.

        gradient: (sequences, layers, units), the loss's gradient in the gates of the last `draw`.

        Nothing is updated here: the evidence was added before, and the next `draw` reads it.
        """
        cut = self.constraint.cut(self.evidence.scores)
        # The price of a unit: the loss per token that one more full unit would save.
        # JSON has no infinity.
        prices = [value if abs(value) != float("inf") else None for value in cut.tolist()]
        norm = torch.linalg.vector_norm(gradient.sum(dim=0))
        return {"multipliers": {"lambda": prices}, "gate_grad_norm": norm.item()}

    @property
    def scores(self) -> Tensor:
        """The values that the table is cut by, (layers, units) fp64."""
        return self.evidence.scores

    @property
    def open_probability(self) -> Tensor:
        """The gates of the last step, (layers, units) fp64.

        z counts as the probability of being open, taken at its mean.
        """
        return self.z

    @property
    def decided_probability(self) -> Tensor:
        """The larger of P(z = 0) and P(z = 1), (layers, units) fp64."""
        return torch.maximum(self.z, 1 - self.z)

    def state(self) -> dict[str, Tensor]:
        """Empty: the gates hold nothing besides the evidence."""
        return {}
