"""Scores, standard errors and agreements, compared with the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.consa.evidence import (
    BLOCKS,
    Evidence,
    EvidenceSummary,
    chance_separated_share,
    least_agreement,
    rank_correlations,
)

CONSTRAINT = Constraint(3, 4, 0.5)
STEPS = 5 * BLOCKS
"""A run of this many steps has blocks of five steps."""
SEQUENCES = 3
MEMORY_SHARE = 0.3


def measured(steps: int, probed: float = 1.0) -> tuple[Evidence, Tensor, Tensor]:
    """Makes the evidence of the first steps.

    Returns the evidence, the fall of the loss for every sequence, of shape (steps, sequences,
    layers, units), and the weight of each fall.
    """
    generator = torch.Generator().manual_seed(0)
    falls = torch.randn(steps, SEQUENCES, 3, 4, generator=generator, dtype=torch.float64) + 0.3
    seen = torch.rand(steps, SEQUENCES, 3, 4, generator=generator) < probed
    evidence = Evidence(CONSTRAINT, STEPS, MEMORY_SHARE)
    for step in range(steps):
        evidence.add(falls[step], seen[step], step)
    age = steps - 1 - torch.arange(steps, dtype=torch.float64)
    weights = torch.exp(-age / (MEMORY_SHARE * STEPS))[:, None, None, None] * seen
    return evidence, falls, weights


def table(constraint: Constraint, evidence: Evidence) -> Tensor:
    return constraint.top_k(evidence.scores)


# 63 steps end inside a block. 60 steps end with a block.
@pytest.mark.parametrize("steps", [60, 63, STEPS])
@pytest.mark.parametrize("probed", [1.0, 0.6], ids=["all", "some"])
def test_score_is_the_weighted_mean_and_its_error_that_of_block_means(
    steps: int, probed: float
) -> None:
    evidence, falls, weights = measured(steps, probed)
    total = weights.sum(dim=(0, 1))
    mean = (weights * falls).sum(dim=(0, 1)) / total
    torch.testing.assert_close(evidence.scores, mean)

    block_weights = torch.stack([part.sum(dim=(0, 1)) for part in weights.split(5)])
    block_means = (
        torch.stack([part.sum(dim=(0, 1)) for part in (weights * falls).split(5)]) / block_weights
    )
    shares = block_weights / total
    blocks = 1 / shares.square().sum(dim=0)
    variance = (shares.square() * (block_means - mean).square()).sum(dim=0) * blocks / (blocks - 1)
    torch.testing.assert_close(evidence.blocks, blocks)
    torch.testing.assert_close(evidence.standard_errors, variance.sqrt())


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_standard_errors_are_the_spread_of_scores_over_repetitions(correlation: float) -> None:
    """All error bars rest on this.

    It holds also where all sequences of a step, and neighbouring steps, have correlated errors.
    """
    generator = torch.Generator().manual_seed(2)
    constraint = Constraint(4, 8, 0.5)
    steps = 20 * BLOCKS
    scores = []
    errors = []
    for _ in range(30):
        evidence = Evidence(constraint, steps, 1.0)
        wander = torch.zeros(4, 8)
        for step in range(steps):
            fresh = torch.randn(4, 8, generator=generator)
            wander = correlation * wander + math.sqrt(1 - correlation**2) * fresh
            own = torch.randn(2, 4, 8, generator=generator)
            evidence.add((wander + 0.1 * own).double(), torch.ones(2, 4, 8, dtype=torch.bool), step)
        scores.append(evidence.scores)
        errors.append(evidence.standard_errors)
    spread = torch.stack(scores).square().mean().sqrt()
    reported = torch.stack(errors).square().mean().sqrt()
    assert float(reported / spread) == pytest.approx(1, abs=0.15)


def test_halves_are_alternate_blocks_and_the_two_parts_of_the_run() -> None:
    evidence, falls, weights = measured(STEPS)
    products = (weights * falls).sum(dim=1)
    blocks = torch.arange(STEPS) // 5
    state = evidence.state()
    for half in range(2):
        torch.testing.assert_close(
            state["evidence.split_sum"][half], products[blocks % 2 == half].sum(dim=0)
        )
    torch.testing.assert_close(state["evidence.time_sum"][0], products[: STEPS // 2].sum(dim=0))
    torch.testing.assert_close(state["evidence.time_sum"][1], products[STEPS // 2 :].sum(dim=0))


def test_halves_stay_where_units_are_being_decided() -> None:
    evidence, falls, _ = measured(40)
    before = {name: value.clone() for name, value in evidence.state().items()}
    evidence.add(falls[0], torch.ones(SEQUENCES, 3, 4, dtype=torch.bool), 40, split=False)
    after = evidence.state()
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same == name.startswith(("evidence.split_", "evidence.time_")), name


def test_rank_correlation_is_spearmans() -> None:
    first = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [9, 7, 5, 3], [1, 1, 2, 2]]).double()
    second = torch.tensor([[10.0, 20, 30, 40], [4, 3, 2, 1], [8, 6, 7, 1], [5, 6, 5, 6]]).double()
    # The same order, the reverse order, one swap of neighbours (1 - 6 * 2 / (4 * 15)), and ties
    # that carry no information about each other.
    assert rank_correlations(first, second).tolist() == pytest.approx([1, -1, 0.8, 0])


def test_rank_correlation_of_equal_values_is_unknown() -> None:
    """Equal values agree about nothing.

    Gradients are all zero when, for example, the window is longer than every document.
    """
    assert (
        rank_correlations(torch.zeros(1, 4).double(), torch.arange(4.0).double()[None])
        .isnan()
        .all()
    )
    evidence = Evidence(CONSTRAINT, STEPS, 1.0)
    for step in range(20):
        evidence.add(torch.zeros(2, 3, 4).double(), torch.ones(2, 3, 4, dtype=torch.bool), step)
    summary = evidence.summary(table(CONSTRAINT, evidence))
    assert summary.split_agreement is None
    assert summary.separated_share == 0
    assert summary.fault(0.5) is not None


def test_separated_and_contradicted_units() -> None:
    constraint = Constraint(1, 4, 0.5)
    evidence = Evidence(constraint, 100, 1e12)
    means = torch.tensor([[1.0, 0.51, 0.49, 0.0]]).double()
    for step in range(100):
        evidence.add(
            (means + (-1) ** (step // 3))[None], torch.ones(1, 1, 4, dtype=torch.bool), step
        )
    z = evidence.z_scores[0].abs().tolist()
    assert z[0] == pytest.approx(z[3], rel=0.2)
    assert z[0] > 2 > z[1]
    right = torch.tensor([[True, True, False, False]])
    assert evidence.summary(right).separated_share == 0.5
    assert evidence.summary(right).contradicted_share == 0
    # Clear evidence against a table does not support it.
    assert evidence.summary(~right).separated_share == 0
    assert evidence.summary(~right).contradicted_share == 0.5
    fault = EvidenceSummary(0.9, 0.9, 0.5, 0.5, 32, 0.5).fault(0.5)
    assert fault is not None
    assert "the gates did not follow it" in fault


def test_a_unit_that_the_floor_keeps_contradicts_nothing() -> None:
    """The floor keeps a unit of the second layer, although all evidence is for the first one."""
    constraint = Constraint(2, 2, 0.5, scope="global", floor=1)
    evidence = Evidence(constraint, 100, 1e12)
    means = torch.tensor([[1.0, 0.9], [0.1, 0.0]]).double()
    noise = torch.Generator().manual_seed(0)
    for step in range(100):
        sample = means + 0.01 * torch.randn(1, 2, 2, dtype=torch.float64, generator=noise)
        evidence.add(sample, torch.ones(1, 2, 2, dtype=torch.bool), step)
    table = constraint.top_k(evidence.scores)
    assert table.tolist() == [[True, False], [True, False]]
    assert evidence.summary(table).contradicted_share == 0
    other = torch.tensor([[True, False], [False, True]])
    assert evidence.summary(other).contradicted_share == 0.25


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.875])
def test_chance_is_what_noise_gives(sparsity: float) -> None:
    """With 32 blocks the errors themselves are uncertain, which adds a little to the share."""
    generator = torch.Generator().manual_seed(3)
    constraint = Constraint(1, 2000, sparsity)
    evidence = Evidence(constraint, BLOCKS, 1e12)
    for step in range(BLOCKS):
        falls = torch.randn(1, 1, 2000, generator=generator, dtype=torch.float64)
        evidence.add(falls, torch.ones(1, 1, 2000, dtype=torch.bool), step)
    share = evidence.summary(table(constraint, evidence)).separated_share
    assert share == pytest.approx(chance_separated_share(sparsity), abs=0.03)


@pytest.mark.parametrize("sparsity", [0.01, 0.25, 0.5, 0.875, 0.98, 0.99])
def test_certainty_is_accepted_and_chance_refused_at_every_sparsity(sparsity: float) -> None:
    assert EvidenceSummary(1.0, 1.0, 1.0, 0.0, 32, 0.5).fault(sparsity) is None
    chance = chance_separated_share(sparsity)
    assert EvidenceSummary(1.0, 1.0, 1.05 * chance, 0.0, 32, 0.5).fault(sparsity) is not None


def test_few_units_must_agree_more() -> None:
    assert least_agreement(Constraint(28, 8, 0.5)) == 0.5
    assert least_agreement(Constraint(12, 8, 0.5, "layer", "global")) == pytest.approx(
        2.5 / math.sqrt(11)
    )
    assert least_agreement(Constraint(1, 4, 0.5)) == 0.95


def test_nothing_measured_is_no_evidence() -> None:
    evidence = Evidence(CONSTRAINT, STEPS, MEMORY_SHARE)
    for _ in range(2):
        summary = evidence.summary(table(CONSTRAINT, evidence))
        assert summary.split_agreement is None
        assert summary.separated_share == 0
        assert not evidence.scores.any()
        assert bool(evidence.standard_errors.isinf().all())
        evidence.add(torch.ones(2, 3, 4).double(), torch.zeros(2, 3, 4, dtype=torch.bool), 0)
    full = Constraint(3, 4, 0.0)
    nothing = Evidence(full, STEPS, MEMORY_SHARE)
    assert nothing.summary(table(full, nothing)).separated_share is None


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        (EvidenceSummary(None, None, None, None, 0, 0.5), "there is too little evidence"),
        (EvidenceSummary(0.9, 0.9, 0.9, 0.0, 3, 0.5), "there is too little evidence (3 blocks"),
        (
            EvidenceSummary(0.2, 0.9, 0.9, 0.0, 30, 0.5),
            "alternate blocks of steps order the units differently",
        ),
        (EvidenceSummary(0.6, 0.9, 0.9, 0.0, 30, 0.7), "at least 0.70 is wanted"),
        (
            EvidenceSummary(0.9, 0.2, 0.9, 0.0, 30, 0.5),
            "the order of the units changed while they were measured",
        ),
        (EvidenceSummary(0.9, 0.9, 0.05, 0.0, 30, 0.5), "only 5% of the units differ from the cut"),
    ],
)
def test_why_evidence_does_not_support_an_allocation(
    summary: EvidenceSummary, sentence: str
) -> None:
    fault = summary.fault(0.5)
    assert fault is not None
    assert sentence in fault


def test_good_evidence_has_no_fault() -> None:
    assert EvidenceSummary(0.9, 0.9, 0.6, 0.0, 30, 0.5).fault(0.5) is None
