"""What the sequences seen so far say about each unit: a running mean of its gradient, with a standard error.

Every sequence gives one measurement per unit, g = -dL/dz with L that sequence's mean loss: by how much the loss would fall if
the unit opened a little further. A unit's score is the mean of g. Its standard error says how far the score may be from the
truth by chance, and two halves of the sequences say whether the order of the units would be found again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint

SEPARATION = 2.0
"""Standard errors from the cut beyond which a unit counts as separated from it."""


class Evidence:
    """Weighted sums over sequences, fp64 on the CPU. Older sequences count less, since the weights move while gates learn.

    Units whose gate is exactly 0 or 1 have no gradient by definition and add nothing, not a zero.
    """

    def __init__(self, constraint: Constraint, memory: float) -> None:
        """memory: steps after which a sequence's weight has fallen to 1/e."""
        self.constraint = constraint
        self.decay = math.exp(-1 / memory)
        self._weight = torch.zeros(constraint.shape, dtype=torch.float64)
        self._squared_weight = torch.zeros(constraint.shape, dtype=torch.float64)
        self._sum = torch.zeros(constraint.shape, dtype=torch.float64)
        self._squared_sum = torch.zeros(constraint.shape, dtype=torch.float64)
        self._half_weight = torch.zeros(2, *constraint.shape, dtype=torch.float64)
        self._half_sum = torch.zeros(2, *constraint.shape, dtype=torch.float64)

    def add(self, falls: Tensor, probed: Tensor, first_sequence: int, *, split: bool = True) -> None:
        """Adds one step's sequences.

        falls: (sequences, layers, units) fp64, each sequence's -dL/dz. probed: booleans of the same shape, where 0 < z < 1.
        first_sequence: how many sequences came before, which decides the half that each belongs to.
        split: False leaves the halves as they are. It must be False while units are decided by their evidence: those on
        which the halves agree are decided first and stop being measured, so noise that happens to agree would be kept.
        """
        falls = falls * probed
        self._weight *= self.decay
        self._squared_weight *= self.decay**2
        self._sum *= self.decay
        self._squared_sum *= self.decay
        counted = probed.sum(dim=0)
        self._weight += counted
        self._squared_weight += counted
        self._sum += falls.sum(dim=0)
        self._squared_sum += falls.square().sum(dim=0)
        if not split:
            return
        self._half_weight *= self.decay
        self._half_sum *= self.decay
        for half in range(2):
            start = (half - first_sequence) % 2
            self._half_weight[half] += probed[start::2].sum(dim=0)
            self._half_sum[half] += falls[start::2].sum(dim=0)

    @property
    def scores(self) -> Tensor:
        """Mean fall of the loss as a unit opens, nats per token: (layers, units) fp64. 0 where nothing was measured."""
        return self._sum / self._weight.clamp(min=1e-300)

    @property
    def standard_errors(self) -> Tensor:
        """Of the scores, (layers, units) fp64. Infinity where fewer than two sequences were measured."""
        mean_square = self._squared_sum / self._weight
        variance = (mean_square - self.scores.square()).clamp(min=0)
        # Number of equally weighted sequences with the same standard error.
        effective = self._weight.square() / self._squared_weight
        errors = (variance / (effective - 1)).sqrt()
        return errors.where(effective > 1, torch.inf)

    @property
    def z_scores(self) -> Tensor:
        """Distance of each score from its constraint's cut in standard errors, signed: (layers, units) fp64."""
        cut = self.constraint.cut(self.scores)[:, None]
        distances = (self.constraint.rows(self.scores) - cut).reshape(self.constraint.shape)
        return (distances / self.standard_errors).nan_to_num(nan=0.0)

    def summary(self) -> EvidenceSummary:
        return EvidenceSummary(self.split_agreement(), self.separated_share())

    def split_agreement(self) -> float | None:
        """Spearman's rank correlation of the scores from the two halves, averaged over the constraints.

        None before both halves measured every unit, and where a constraint holds a single unit.
        """
        if self.constraint.units == 1 or bool((self._half_weight == 0).any()):
            return None
        first, second = self._half_sum / self._half_weight
        return float(_rank_correlations(self.constraint.rows(first), self.constraint.rows(second)).mean())

    def separated_share(self) -> float | None:
        """Share of units whose score lies more than SEPARATION standard errors from the cut. None where nothing is cut."""
        if self.constraint.windowed in (0, self.constraint.units):
            return None
        return float((self.z_scores.abs() > SEPARATION).double().mean())

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies."""
        return {
            "evidence.weight": self._weight,
            "evidence.squared_weight": self._squared_weight,
            "evidence.sum": self._sum,
            "evidence.squared_sum": self._squared_sum,
            "evidence.half_weight": self._half_weight,
            "evidence.half_sum": self._half_sum,
        }


LEAST_AGREEMENT = 0.5
"""Below this split_agreement an allocation is not supported by evidence."""


@dataclass(frozen=True)
class EvidenceSummary:
    """Whether a run's evidence supports its allocation. Fields are None before there is any."""

    split_agreement: float | None
    separated_share: float | None

    def fault(self, sparsity: float) -> str | None:
        """What speaks against the allocation, in one sentence; None where the evidence supports it."""
        if self.split_agreement is None or self.separated_share is None:
            return "no evidence was gathered: no gate lay between 0 and 1 for long enough"
        if self.split_agreement < LEAST_AGREEMENT:
            return (
                f"two halves of the sequences order the units differently (split_agreement {self.split_agreement:.2f}, "
                f"at least {LEAST_AGREEMENT} is wanted): learn for more steps, or with larger batches"
            )
        chance = chance_separated_share(sparsity)
        if self.separated_share < 2 * chance:
            return (
                f"only {self.separated_share:.0%} of the units differ from the cut by more than {SEPARATION:g} standard errors "
                f"(noise alone gives {chance:.0%}): learn for more steps, or with larger batches"
            )
        return None


def chance_separated_share(sparsity: float) -> float:
    """The separated_share that pure noise gives: scores that differ by chance alone, cut at the quantile `sparsity`.

    5 % at 0.5, 10 % at 0.75, 20 % at 0.875: the further the cut lies from the middle, the more units are far from it.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    cut = normal.icdf(torch.tensor(sparsity))
    return float(normal.cdf(cut - SEPARATION) + normal.cdf(-cut - SEPARATION))


def _rank_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's coefficient of each row, (rows,) fp64."""
    ranks = torch.stack((first, second)).argsort(dim=-1).argsort(dim=-1).double()
    centred = ranks - ranks.mean(dim=-1, keepdim=True)
    covariance = (centred[0] * centred[1]).sum(dim=-1)
    return covariance / centred.square().sum(dim=-1)[0]
