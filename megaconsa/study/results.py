"""Combines the measures of all trials into one row for each arm and sparsity."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.consa.constraint import Scope
from megaconsa.study.comparison import (
    Interval,
    Table,
    agreement,
    mean_difference,
    mean_of,
    overlap,
)
from megaconsa.study.fields import Trial
from megaconsa.study.learning import LearningFigures, best_units, read_learning
from megaconsa.study.measures import Measures, SequenceLosses
from megaconsa.study.runs import Runs

YARDSTICK = "leave-one-out"
"""Scoring method whose table the others are compared with."""
BEST_UNITS = 10
"""Number of top-scored units that are compared between seeds."""


@dataclass(frozen=True)
class Outcome:
    """The results of one measured trial."""

    trial: Trial
    measures: Measures
    reference: Measures | None
    """Measures of the dense trial to compare with, if there are any."""
    learning: LearningFigures | None
    """Figures of the learning run, if the arm learns."""


Groups = dict[tuple[str, float | None], list[Outcome]]
"""Outcomes by arm and sparsity."""
Pairs = list[tuple[SequenceLosses, SequenceLosses]]
"""Losses of trials, each with the losses that they are compared with."""


@dataclass(frozen=True)
class ResultRow:
    """An arm at one sparsity, over its seeds and draws.

    None means that a figure does not apply, or was not measured yet.
    """

    arm: str
    target: float | None
    """Target sparsity."""
    trials: int
    validation_loss: float
    """Nats per token, mean over the trials."""
    difference: Interval | None
    """Validation loss minus that of the dense arm of the same seed and budget."""
    far_difference: Interval | None
    """The same difference for tokens far into their document."""
    leave_one_out_difference: Interval | None
    """Validation loss minus that of the leave-one-out arm.

    That arm has the same sparsity, granularity, budget and seed. It has the same scope too if there
    is one with that scope.
    """
    needle_accuracy: float | None
    needle_margin: float | None
    sparsity: float
    """Share of windowed KV heads that was reached."""
    leave_one_out_overlap: float | None
    """Share of the full heads that leave-one-out keeps full too."""
    agreement: float | None
    """Mean share of full heads that two seeds or draws have in common."""
    common_best: int | None
    """How many of the BEST_UNITS top-scored units are the same in all seeds."""
    cost: float | None
    """Duration of a learning step over that of a dense step."""
    steps_to_target: float | None
    split_agreement: float | None
    separated_share: float | None
    full_share: list[list[float]]
    """Share of the trials in which each head is full, (layers, KV heads)."""


def collect(runs: Runs) -> list[ResultRow]:
    """Returns the rows of all measured trials, in the order of the study."""
    groups: Groups = {}
    for trial in runs.study.trials():
        if runs.measures_file(trial).exists():
            outcome = _read(runs, trial)
            groups.setdefault((trial.arm, trial.sparsity), []).append(outcome)
    rows = []
    for (arm, target), outcomes in groups.items():
        yardsticks = _yardsticks(runs, groups, outcomes[0])
        rows.append(_row(runs, arm, target, outcomes, yardsticks))
    return rows


def _read(runs: Runs, trial: Trial) -> Outcome:
    reference = runs.study.reference(trial)
    compared = None
    if reference is not None and reference != trial and runs.measures_file(reference).exists():
        compared = Measures.load(runs.measures_file(reference))
    learning = None
    if runs.arm(trial).kind == "learn":
        assert trial.sparsity is not None
        # Not compared with the start, which may have been trained on more GPUs.
        dense = runs.train_folder(reference) if reference is not None else None
        learning = read_learning(runs.learn_folder(trial), dense, trial.sparsity)
    return Outcome(trial, Measures.load(runs.measures_file(trial)), compared, learning)


def _yardsticks(runs: Runs, groups: Groups, own: Outcome) -> list[list[Outcome]]:
    """Returns the outcomes of the other leave-one-out arms, with the best match first.

    They have the sparsity and the granularity of the trial `own`. Those of its scope come before
    the global ones, and other scopes are no match. Among equals those of its budget come first.
    """
    own_scope = _scope(runs, own)
    own_budget = runs.arm(own.trial).whole_budget
    found = []
    for (name, sparsity), outcomes in groups.items():
        first = outcomes[0]
        arm = runs.study.arms[name]
        if arm.score != YARDSTICK or name == own.trial.arm:
            continue
        if sparsity != own.trial.sparsity:
            continue
        if first.measures.granularity != own.measures.granularity:
            continue
        scope = _scope(runs, first)
        if scope in (own_scope, "global"):
            found.append((scope != own_scope, arm.whole_budget != own_budget, outcomes))
    found.sort(key=lambda entry: entry[:2])
    return [outcomes for *_, outcomes in found]


def _scope(runs: Runs, outcome: Outcome) -> Scope:
    # Rules that choose layers have no scope, and layers are always chosen over the whole model.
    if outcome.measures.granularity == "layer":
        return "global"
    return runs.units(outcome.trial)[1]


def _beside(runs: Runs, own: Sequence[Outcome], yardsticks: Sequence[list[Outcome]]) -> Pairs:
    """Returns the losses of each trial and those of the yardstick of the same budget.

    Trials are left out if the yardstick does not have their seed.
    """
    budget = runs.arm(own[0].trial).whole_budget
    for others in yardsticks:
        if runs.arm(others[0].trial).whole_budget != budget:
            continue
        by_seed = {other.trial.seed: other.measures.losses for other in others}
        pairs = []
        for outcome in own:
            if outcome.trial.seed in by_seed:
                pairs.append((outcome.measures.losses, by_seed[outcome.trial.seed]))
        return pairs
    return []


def _row(
    runs: Runs,
    arm: str,
    target: float | None,
    outcomes: Sequence[Outcome],
    yardsticks: Sequence[list[Outcome]],
) -> ResultRow:
    measured = [outcome.measures for outcome in outcomes]
    tables = [measures.full for measures in measured]
    losses = []
    far_losses = []
    for outcome in outcomes:
        own = outcome.measures
        dense = outcome.reference
        if dense is not None:
            losses.append((own.losses, dense.losses))
            far_losses.append((own.far_losses, dense.far_losses))
    learned = [outcome.learning for outcome in outcomes if outcome.learning is not None]
    common = None
    if yardsticks:
        # Units are scored once, on the start checkpoint, so all trials of the yardstick have the
        # same table.
        kept = yardsticks[0][0].measures.full
        common = mean_of([overlap(table, kept) for table in tables])
    # All other arms have the same table in every trial.
    varies = bool(learned) or runs.study.arms[arm].draws is not None
    return ResultRow(
        arm=arm,
        target=target,
        trials=len(outcomes),
        validation_loss=statistics.mean(_known(measures.losses.mean) for measures in measured),
        difference=mean_difference(losses),
        far_difference=mean_difference(far_losses),
        leave_one_out_difference=mean_difference(_beside(runs, outcomes, yardsticks)),
        needle_accuracy=mean_of([measures.needle_accuracy for measures in measured]),
        needle_margin=mean_of([measures.needle_margin for measures in measured]),
        sparsity=statistics.mean(measures.sparsity for measures in measured),
        leave_one_out_overlap=common,
        agreement=agreement(tables) if varies else None,
        common_best=_common_best(learned),
        cost=mean_of([figures.cost for figures in learned]),
        steps_to_target=mean_of([figures.steps_to_target for figures in learned]),
        split_agreement=mean_of([figures.split_agreement for figures in learned]),
        separated_share=mean_of([figures.separated_share for figures in learned]),
        full_share=_full_share(tables),
    )


def _known(mean: float | None) -> float:
    assert mean is not None, "every held-out sequence has labelled tokens"
    return mean


def _common_best(learned: Sequence[LearningFigures]) -> int | None:
    """Counts the top-scored units that are the same in all runs. None for fewer than two runs."""
    scored = [figures.scores for figures in learned if figures.scores is not None]
    if len(scored) < 2:
        return None
    best = [best_units(scores, BEST_UNITS) for scores in scored]
    return len(set.intersection(*best))


def _full_share(tables: Sequence[Table]) -> list[list[float]]:
    """Returns the share of the tables in which each head is full."""
    layers = len(tables[0])
    heads = len(tables[0][0])
    shares = []
    for layer in range(layers):
        row = []
        for head in range(heads):
            row.append(statistics.mean(float(table[layer][head]) for table in tables))
        shares.append(row)
    return shares
