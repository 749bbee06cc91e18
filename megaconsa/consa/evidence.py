"""What the sequences seen so far say about each unit: a running mean of its gradient, with a standard error.

Every sequence gives one measurement per unit, g = -dL/dz with L its share of the batch's loss: by how much the loss would fall
if the unit opened a little further. A unit's score is the mean of g.

The sequences of a step share its weights, and neighbouring steps nearly do, so measurements are not independent. They are
therefore grouped into blocks of consecutive steps. The standard error comes from the scatter of the blocks' means (batch means,
Law and Carson 1979), and two halves that are compared consist of alternate blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint

BLOCKS = 32
"""Blocks of a run. Longer blocks are closer to independent, more of them give steadier standard errors."""
SEPARATION = 2.0
"""Standard errors from the cut beyond which a unit counts as separated from it."""
LEAST_AGREEMENT = 0.5
"""Below this an agreement does not support an allocation. Few units need more, see `least_agreement`."""
LEAST_BLOCKS = 4
"""Fewer blocks give no standard error worth the name."""
MOST_CONTRADICTED = 0.05
"""Share of units that may be significantly on the wrong side of the table."""

Sums = dict[str, Tensor]


class Evidence:
    """Weighted sums, fp64 on the CPU. Older sequences count less, since the weights move while gates learn.

    Units whose gate is exactly 0 or 1 have no gradient by definition and add nothing, not a zero.
    """

    def __init__(self, constraint: Constraint, steps: int, memory_share: float) -> None:
        """steps: of the whole run. memory_share: after this share of them a sequence's weight has fallen to 1/e."""
        self.constraint = constraint
        self.decay = math.exp(-1 / (memory_share * steps))
        self.block_steps = max(1, round(steps / BLOCKS))
        self.middle = steps / 2
        zeros = torch.zeros(constraint.shape, dtype=torch.float64)
        pairs = torch.zeros(2, *constraint.shape, dtype=torch.float64)
        self._sums: Sums = {
            # Of the block under way: its weight W and its weighted sum of measurements S.
            "block_weight": zeros.clone(),
            "block_sum": zeros.clone(),
            # Over finished blocks: sums of W, S, W^2, W S and S^2.
            "weight": zeros.clone(),
            "sum": zeros.clone(),
            "weight_squared": zeros.clone(),
            "weight_times_sum": zeros.clone(),
            "sum_squared": zeros.clone(),
            # Of the two halves: alternate blocks, and the first and second half of the run.
            "split_weight": pairs.clone(),
            "split_sum": pairs.clone(),
            "time_weight": pairs.clone(),
            "time_sum": pairs.clone(),
        }

    def add(self, falls: Tensor, probed: Tensor, step: int, *, split: bool = True) -> None:
        """Adds one step's sequences.

        falls: (sequences, layers, units) fp64, each sequence's -dL/dz. probed: booleans of the same shape, where 0 < z < 1.
        split: False leaves the halves as they are. It must be False while units are decided by their evidence: those on
        which the halves agree are decided first and stop being measured, so noise that happens to agree would be kept.
        """
        sums = self._sums
        self._forget(split)
        weight = probed.sum(dim=0).double()
        total = (falls * probed).sum(dim=0)
        sums["block_weight"] += weight
        sums["block_sum"] += total
        if split:
            block = step // self.block_steps
            sums["split_weight"][block % 2] += weight
            sums["split_sum"][block % 2] += total
            late = int(step >= self.middle)
            sums["time_weight"][late] += weight
            sums["time_sum"][late] += total
        if (step + 1) % self.block_steps == 0:
            self._finish_block()

    def _forget(self, split: bool) -> None:
        """Lowers the weight of all that was measured before."""
        squares = {"weight_squared", "weight_times_sum", "sum_squared"}
        for name, value in self._sums.items():
            of_halves = name.startswith(("split_", "time_"))
            if of_halves and not split:
                continue
            value *= self.decay**2 if name in squares else self.decay

    def _finish_block(self) -> None:
        for name, value in self._with_block().items():
            self._sums[name].copy_(value)
        self._sums["block_weight"].zero_()
        self._sums["block_sum"].zero_()

    def _with_block(self) -> Sums:
        """The sums over blocks, the one under way included."""
        sums = self._sums
        weight = sums["block_weight"]
        total = sums["block_sum"]
        return {
            "weight": sums["weight"] + weight,
            "sum": sums["sum"] + total,
            "weight_squared": sums["weight_squared"] + weight.square(),
            "weight_times_sum": sums["weight_times_sum"] + weight * total,
            "sum_squared": sums["sum_squared"] + total.square(),
        }

    @property
    def scores(self) -> Tensor:
        """Mean fall of the loss as a unit opens, nats per token: (layers, units) fp64. 0 where nothing was measured."""
        sums = self._with_block()
        return sums["sum"] / sums["weight"].clamp(min=1e-300)

    @property
    def blocks(self) -> Tensor:
        """Equally weighted blocks that tell as much as those measured: (layers, units) fp64."""
        sums = self._with_block()
        return (sums["weight"].square() / sums["weight_squared"]).nan_to_num(nan=0.0)

    @property
    def standard_errors(self) -> Tensor:
        """Of the scores, (layers, units) fp64. Infinity before there are two blocks."""
        sums = self._with_block()
        mean = self.scores
        # The sum over blocks of W^2 (mean of the block - mean)^2.
        squares = (
            sums["sum_squared"]
            - 2 * mean * sums["weight_times_sum"]
            + mean.square() * sums["weight_squared"]
        )
        blocks = self.blocks
        variance = squares.clamp(min=0) / sums["weight"].square() * blocks / (blocks - 1)
        return variance.sqrt().where(blocks > 1.5, torch.inf)

    @property
    def z_scores(self) -> Tensor:
        """Distance of each score from its constraint's cut in standard errors, signed: (layers, units) fp64."""
        cut = self.constraint.cut(self.scores)[:, None]
        distances = (self.constraint.rows(self.scores) - cut).reshape(self.constraint.shape)
        return (distances / self.standard_errors).nan_to_num(nan=0.0)

    def summary(self, table: Tensor) -> EvidenceSummary:
        """table: (layers, units) booleans, the allocation that the evidence is to support; True is full."""
        z_scores = self.z_scores
        right_side = (z_scores > 0) == table
        significant = z_scores.abs() > SEPARATION
        has_cut = self.constraint.windowed not in (0, self.constraint.units)
        return EvidenceSummary(
            split_agreement=self._agreement("split"),
            time_agreement=self._agreement("time"),
            separated_share=_share(significant & right_side) if has_cut else None,
            contradicted_share=_share(significant & ~right_side) if has_cut else None,
            blocks=float(self.blocks.median()),
            least_agreement=least_agreement(self.constraint),
        )

    def _agreement(self, kind: str) -> float | None:
        """Spearman's rank correlation of the scores from two halves, averaged over the constraints.

        None before both halves measured every unit, and where no constraint has scores that differ.
        """
        weight = self._sums[f"{kind}_weight"]
        if bool((weight == 0).any()):
            return None
        first, second = self._sums[f"{kind}_sum"] / weight
        found = rank_correlations(self.constraint.rows(first), self.constraint.rows(second))
        known = found[found.isfinite()]
        return float(known.mean()) if len(known) else None

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies."""
        return {f"evidence.{name}": value for name, value in self._sums.items()}


@dataclass(frozen=True)
class EvidenceSummary:
    """Whether a run's evidence supports its allocation. None is what has not been measured, or does not apply."""

    split_agreement: float | None
    """Rank correlation of the scores from alternate blocks of steps: would the order be found again?"""
    time_agreement: float | None
    """The same of the first and the second half of the measurements: does the order still hold?"""
    separated_share: float | None
    """Share of units whose score lies more than SEPARATION standard errors from the cut, on the side where the table has them."""
    contradicted_share: float | None
    """Share of those that lie as far on the other side: the table and the evidence disagree."""
    blocks: float
    """Blocks of steps that the standard errors rest on."""
    least_agreement: float

    def fault(self, sparsity: float) -> str | None:
        """Why the evidence does not support the allocation, in one sentence; None where it does."""
        advice = "learn for more steps, or with larger batches"
        if (
            self.split_agreement is None
            or self.separated_share is None
            or self.blocks < LEAST_BLOCKS
        ):
            return f"there is too little evidence ({self.blocks:.0f} blocks of steps, at least {LEAST_BLOCKS} are needed): {advice}"
        least = self.least_agreement
        if self.split_agreement < least:
            return (
                f"alternate blocks of steps order the units differently (split_agreement {self.split_agreement:.2f}, at least "
                f"{least:.2f} is wanted): {advice}"
            )
        if self.time_agreement is not None and self.time_agreement < least:
            return (
                f"the order of the units changed while they were measured (time_agreement {self.time_agreement:.2f}, at least "
                f"{least:.2f} is wanted): start from a trained model (model.init_from), or learn for more steps"
            )
        if self.contradicted_share is not None and self.contradicted_share > MOST_CONTRADICTED:
            return (
                f"{self.contradicted_share:.0%} of the units are on the other side of the cut than their evidence, by more than "
                f"{SEPARATION:g} standard errors: the gates did not follow it"
            )
        wanted = wanted_separated_share(sparsity)
        if self.separated_share < wanted:
            return (
                f"only {self.separated_share:.0%} of the units differ from the cut by more than {SEPARATION:g} standard errors "
                f"(noise alone gives about {chance_separated_share(sparsity):.0%}, {wanted:.0%} are wanted): {advice}"
            )
        return None


def least_agreement(constraint: Constraint) -> float:
    """The rank correlation below which two halves do not agree: 0.5, or 2.5 standard deviations of noise where units are few.

    Of n units without signal, Spearman's coefficient has a standard deviation of 1 / sqrt(n - 1).
    """
    if constraint.units == 1:
        return LEAST_AGREEMENT
    of_noise = 1 / math.sqrt((constraint.units - 1) * constraint.count)
    return min(0.95, max(LEAST_AGREEMENT, 2.5 * of_noise))


def chance_separated_share(sparsity: float) -> float:
    """The separated_share of pure noise, for units with equal standard errors, cut at the quantile `sparsity`.

    5 % at 0.5, 10 % at 0.75, 20 % at 0.875: the further the cut lies from the middle, the more units are far from it.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    cut = normal.icdf(torch.tensor(sparsity))
    return float(normal.cdf(cut - SEPARATION) + normal.cdf(-cut - SEPARATION))


def wanted_separated_share(sparsity: float) -> float:
    """A quarter of the way from chance to certainty."""
    chance = chance_separated_share(sparsity)
    return chance + (1 - chance) / 4


def rank_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's coefficient of each row, (rows,) fp64; NaN where a row's values are all equal. Ties share their mean rank."""
    ranks = torch.stack([_mid_ranks(first), _mid_ranks(second)])
    centred = ranks - ranks.mean(dim=-1, keepdim=True)
    covariance = (centred[0] * centred[1]).sum(dim=-1)
    return covariance / centred.square().sum(dim=-1).prod(dim=0).sqrt()


def _mid_ranks(rows: Tensor) -> Tensor:
    below = (rows[:, None, :] < rows[:, :, None]).sum(dim=-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(dim=-1)
    return below.double() + (equal.double() - 1) / 2


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())
