"""Evidence about each unit so far: a running mean of its gradient, with a standard error.

Every sequence gives one measurement per unit, g = -dL/dz. L is the sequence's share of the batch's
loss. The measurement says by how much the loss would fall if the unit opened a little further. A
unit's score is the mean of g.

The sequences of a step share its weights, and neighbouring steps nearly do. Measurements are
therefore not independent. They are grouped into blocks of consecutive steps. The standard error
comes from the scatter of the blocks' means (batch means, Law and Carson 1979). Two halves that are
compared consist of alternate blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint

BLOCKS = 32
"""Blocks of a run. Longer blocks are closer to independent. More blocks steady the errors."""
SEPARATION = 2.0
"""Standard errors from the cut beyond which a unit counts as separated from it."""
LEAST_AGREEMENT = 0.5
"""An agreement below this does not support an allocation.

The bound is higher where units are few, see `least_agreement`.
"""
LEAST_BLOCKS = 4
"""Fewer blocks give no usable standard error."""
MOST_CONTRADICTED = 0.05
"""Share of units that may be significantly on the wrong side of the table."""

Sums = dict[str, Tensor]


class Evidence:
    """Weighted sums of the measurements, fp64 on the CPU.

    Older sequences count less, because the weights move while gates learn. Units whose gate is
    exactly 0 or 1 have no gradient by definition. They add nothing, which differs from adding 0.
    """

    def __init__(self, constraint: Constraint, steps: int, memory_share: float) -> None:
        """Starts without evidence.

        steps: optimizer steps of the whole run.
        memory_share: share of the run after which a sequence's weight has fallen to 1/e.
        """
        self.constraint = constraint
        self.decay = math.exp(-1 / (memory_share * steps))
        self.block_steps = max(1, round(steps / BLOCKS))
        self.middle = steps / 2
        zeros = torch.zeros(constraint.shape, dtype=torch.float64)
        pairs = torch.zeros(2, *constraint.shape, dtype=torch.float64)
        self._sums: Sums = {
            # The current block: its weight W and its weighted sum of measurements S.
            "block_weight": zeros.clone(),
            "block_sum": zeros.clone(),
            # Over finished blocks: sums of W, S, W^2, W S and S^2.
            "weight": zeros.clone(),
            "sum": zeros.clone(),
            "weight_squared": zeros.clone(),
            "weight_times_sum": zeros.clone(),
            "sum_squared": zeros.clone(),
            # Pairs of halves: alternate blocks, and the first and second half of the run.
            "split_weight": pairs.clone(),
            "split_sum": pairs.clone(),
            "time_weight": pairs.clone(),
            "time_sum": pairs.clone(),
        }

    def add(self, falls: Tensor, probed: Tensor, step: int, *, split: bool = True) -> None:
        """Adds the sequences of one step.

        falls: (sequences, layers, units) fp64, each sequence's -dL/dz.
        probed: booleans of the same shape, True where 0 < z < 1.
        split: False leaves the halves as they are.

        `split` must be False while units are decided by their evidence. The units on which the
        halves agree are decided first and stop being measured. Noise that happens to agree would
        then be kept.
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
        """Lowers the weight of everything that was measured before."""
        # These sums are of second order in the weights, so their factor is squared.
        squares = {"weight_squared", "weight_times_sum", "sum_squared"}
        for name, value in self._sums.items():
            of_halves = name.startswith(("split_", "time_"))
            if of_halves and not split:
                continue
            if name in squares:
                value *= self.decay**2
            else:
                value *= self.decay

    def _finish_block(self) -> None:
        """Adds the current block to the finished ones and starts a new one."""
        for name, value in self._with_block().items():
            self._sums[name].copy_(value)
        self._sums["block_weight"].zero_()
        self._sums["block_sum"].zero_()

    def _with_block(self) -> Sums:
        """The sums over blocks, including the current one."""
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
        """Mean fall of the loss as a unit opens, in nats per token: (layers, units) fp64.

        The score is 0 where nothing was measured.
        """
        sums = self._with_block()
        return sums["sum"] / sums["weight"].clamp(min=1e-300)

    @property
    def blocks(self) -> Tensor:
        """Number of equally weighted blocks that are worth as much as the measured ones.

        Returns fp64 (layers, units).
        """
        sums = self._with_block()
        return (sums["weight"].square() / sums["weight_squared"]).nan_to_num(nan=0.0)

    @property
    def standard_errors(self) -> Tensor:
        """Standard errors of the scores, (layers, units) fp64.

        They are infinity before there are two blocks.
        """
        sums = self._with_block()
        mean = self.scores
        # The sum over blocks of W^2 (mean of the block - mean)^2, expanded.
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
        """Signed distance of each score from its constraint's cut, in standard errors.

        Returns fp64 (layers, units).
        """
        cut = self.constraint.cut(self.scores)[:, None]
        distances = (self.constraint.rows(self.scores) - cut).reshape(self.constraint.shape)
        return (distances / self.standard_errors).nan_to_num(nan=0.0)

    def summary(self, table: Tensor) -> EvidenceSummary:
        """Says whether the evidence supports an allocation.

        table: (layers, units) booleans, the allocation to check. True is full.
        """
        separated_share = None
        contradicted_share = None
        has_cut = self.constraint.windowed not in (0, self.constraint.units)
        if has_cut:
            z_scores = self.z_scores
            right_side = (z_scores > 0) == table
            significant = z_scores.abs() > SEPARATION
            separated_share = _share(significant & right_side)
            # The user's floor keeps some units full against their scores.
            by_floor = table & self.constraint.kept_by_floor(self.scores)
            contradicted_share = _share(significant & ~right_side & ~by_floor)
        return EvidenceSummary(
            split_agreement=self._agreement("split"),
            time_agreement=self._agreement("time"),
            separated_share=separated_share,
            contradicted_share=contradicted_share,
            blocks=float(self.blocks.median()),
            least_agreement=least_agreement(self.constraint),
        )

    def _agreement(self, kind: str) -> float | None:
        """Spearman's rank correlation of the scores from two halves, averaged over the constraints.

        kind: "split" or "time".

        Returns None until both halves have measured every unit. Also returns None where no
        constraint has scores that differ.
        """
        weight = self._sums[f"{kind}_weight"]
        if bool((weight == 0).any()):
            return None
        first, second = self._sums[f"{kind}_sum"] / weight
        found = rank_correlations(self.constraint.rows(first), self.constraint.rows(second))
        known = found[found.isfinite()]
        if len(known) == 0:
            return None
        return float(known.mean())

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies."""
        return {f"evidence.{name}": value for name, value in self._sums.items()}


@dataclass(frozen=True)
class EvidenceSummary:
    """Whether a run's evidence supports its allocation.

    None marks what has not been measured or does not apply.
    """

    split_agreement: float | None
    """Rank correlation of the scores from alternate blocks of steps.

    It tells whether the same order would be found again.
    """
    time_agreement: float | None
    """Rank correlation of the scores from the first and the second half of the measurements.

    It tells whether the order still holds.
    """
    separated_share: float | None
    """Share of units that the evidence separates from the cut, on their side of the table.

    The score of such a unit lies more than SEPARATION standard errors from the cut.
    """
    contradicted_share: float | None
    """Share of units that lie as far from the cut, but on the other side.

    The table and the evidence disagree about them.
    """
    blocks: float
    """Number of blocks of steps behind the standard errors."""
    least_agreement: float

    def fault(self, sparsity: float) -> str | None:
        """Why the evidence does not support the allocation, in one sentence.

        Returns None where it does.
        """
        advice = "learn for more steps, or with larger batches"
        if (
            self.split_agreement is None
            or self.separated_share is None
            or self.blocks < LEAST_BLOCKS
        ):
            return (
                f"there is too little evidence ({self.blocks:.0f} blocks of steps, "
                f"at least {LEAST_BLOCKS} are needed): {advice}"
            )
        least = self.least_agreement
        if self.split_agreement < least:
            return (
                "alternate blocks of steps order the units differently "
                f"(split_agreement {self.split_agreement:.2f}, at least {least:.2f} is wanted): "
                f"{advice}"
            )
        if self.time_agreement is not None and self.time_agreement < least:
            return (
                "the order of the units changed while they were measured "
                f"(time_agreement {self.time_agreement:.2f}, at least {least:.2f} is wanted): "
                "start from a trained model (model.init_from), or learn for more steps"
            )
        if self.contradicted_share is not None and self.contradicted_share > MOST_CONTRADICTED:
            return (
                f"{self.contradicted_share:.0%} of the units are on the other side of the cut "
                f"than their evidence, by more than {SEPARATION:g} standard errors: "
                "the gates did not follow it"
            )
        wanted = wanted_separated_share(sparsity)
        if self.separated_share < wanted:
            chance = chance_separated_share(sparsity)
            return (
                f"only {self.separated_share:.0%} of the units differ from the cut "
                f"by more than {SEPARATION:g} standard errors "
                f"(noise alone gives about {chance:.0%}, {wanted:.0%} are wanted): {advice}"
            )
        return None


def least_agreement(constraint: Constraint) -> float:
    """The rank correlation below which two halves do not agree.

    It is 0.5, or 2.5 standard deviations of noise where units are few. Spearman's coefficient of n
    units without signal has a standard deviation of 1 / sqrt(n - 1).
    """
    if constraint.units == 1:
        return LEAST_AGREEMENT
    # The agreement is a mean over the constraints, so their number divides its variance.
    noise = 1 / math.sqrt((constraint.units - 1) * constraint.count)
    return min(0.95, max(LEAST_AGREEMENT, 2.5 * noise))


def chance_separated_share(sparsity: float) -> float:
    """The separated_share of pure noise, for units with equal standard errors.

    sparsity: the quantile at which the units are cut.

    It is 5 % at 0.5, 10 % at 0.75 and 20 % at 0.875. The further the cut lies from the middle, the
    more units are far from it.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    cut = normal.icdf(torch.tensor(sparsity))
    return float(normal.cdf(cut - SEPARATION) + normal.cdf(-cut - SEPARATION))


def wanted_separated_share(sparsity: float) -> float:
    """The separated_share that an allocation needs: a quarter of the way from chance to 1."""
    chance = chance_separated_share(sparsity)
    return chance + (1 - chance) / 4


def rank_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's coefficient of each pair of rows.

    first, second: (rows, values). Ties share their mean rank.

    Returns fp64 (rows,), with NaN where a row's values are all equal.
    """
    ranks = torch.stack([_mid_ranks(first), _mid_ranks(second)])
    centred = ranks - ranks.mean(dim=-1, keepdim=True)
    covariance = (centred[0] * centred[1]).sum(dim=-1)
    return covariance / centred.square().sum(dim=-1).prod(dim=0).sqrt()


def _mid_ranks(rows: Tensor) -> Tensor:
    """Rank of each value within its row, from 0. Ties share their mean rank."""
    below = (rows[:, None, :] < rows[:, :, None]).sum(dim=-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(dim=-1)
    # A value equals itself, hence the - 1.
    return below.double() + (equal.double() - 1) / 2


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())
