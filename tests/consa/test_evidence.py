"""Scores, standard errors and their agreement, against the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.consa.evidence import Evidence, EvidenceSummary, chance_separated_share

CONSTRAINT = Constraint(3, 4, 0.5)
STEPS, SEQUENCES = 7, 5
MEMORY = 4.0


def measured(probed: float = 1.0) -> tuple[Evidence, Tensor, Tensor, Tensor]:
    """Evidence of a few steps; with it every sequence's fall, whether it was probed, and its weight."""
    generator = torch.Generator().manual_seed(0)
    falls = torch.randn(STEPS, SEQUENCES, 3, 4, generator=generator, dtype=torch.float64) + 0.3
    seen = torch.rand(STEPS, SEQUENCES, 3, 4, generator=generator) < probed
    evidence = Evidence(CONSTRAINT, MEMORY)
    for step in range(STEPS):
        evidence.add(falls[step], seen[step], step * SEQUENCES)
    age = STEPS - 1 - torch.arange(STEPS, dtype=torch.float64)
    weights = torch.exp(-age / MEMORY)[:, None, None, None] * seen
    return evidence, falls, seen, weights


@pytest.mark.parametrize("probed", [1.0, 0.6], ids=["all", "some"])
def test_score_is_the_weighted_mean(probed: float) -> None:
    evidence, falls, _, weights = measured(probed)
    mean = (weights * falls).sum(dim=(0, 1)) / weights.sum(dim=(0, 1))
    torch.testing.assert_close(evidence.scores, mean)


@pytest.mark.parametrize("probed", [1.0, 0.6], ids=["all", "some"])
def test_standard_error_is_that_of_a_weighted_mean(probed: float) -> None:
    evidence, falls, _, weights = measured(probed)
    total = weights.sum(dim=(0, 1))
    mean = (weights * falls).sum(dim=(0, 1)) / total
    variance = (weights * (falls - mean).square()).sum(dim=(0, 1)) / total
    effective = total.square() / weights.square().sum(dim=(0, 1))
    torch.testing.assert_close(evidence.standard_errors, (variance / (effective - 1)).sqrt())


def test_standard_error_without_forgetting_is_the_textbooks() -> None:
    generator = torch.Generator().manual_seed(1)
    falls = torch.randn(40, 3, 4, generator=generator, dtype=torch.float64)
    evidence = Evidence(CONSTRAINT, 1e12)
    evidence.add(falls, torch.ones(40, 3, 4, dtype=torch.bool), 0)
    torch.testing.assert_close(evidence.standard_errors, falls.std(dim=0) / math.sqrt(40))


def test_standard_errors_are_the_spread_of_scores_over_repetitions() -> None:
    """The claim behind every error bar: scores of many runs scatter by what one run reports."""
    generator = torch.Generator().manual_seed(2)
    scores = []
    errors = []
    for _ in range(400):
        evidence = Evidence(CONSTRAINT, MEMORY)
        for step in range(30):
            falls = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64)
            evidence.add(falls, torch.ones(4, 3, 4, dtype=torch.bool), 4 * step)
        scores.append(evidence.scores)
        errors.append(evidence.standard_errors)
    spread = torch.stack(scores).std(dim=0).mean()
    assert float(torch.stack(errors).mean() / spread) == pytest.approx(1, abs=0.05)


def test_halves_alternate_over_all_sequences() -> None:
    """Also where a step has an odd number of them, or a single one."""
    _, falls, _, weights = measured()
    evidence = measured()[0]
    flat = falls.reshape(-1, 3, 4)
    flat_weights = weights.expand_as(falls).reshape(-1, 3, 4)
    halves = [(flat_weights[half::2] * flat[half::2]).sum(dim=0) for half in range(2)]
    torch.testing.assert_close(evidence.state()["evidence.half_sum"], torch.stack(halves))


def test_split_agreement_is_spearmans_within_each_constraint() -> None:
    evidence = Evidence(CONSTRAINT, 1e12)
    first = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [9, 7, 5, 3]]).double()
    second = torch.tensor([[10.0, 20, 30, 40], [4, 3, 2, 1], [8, 6, 7, 1]]).double()
    evidence.add(torch.stack((first, second)), torch.ones(2, 3, 4, dtype=torch.bool), 0)
    # In order, reversed, and one swap of neighbours: 1 - 6 * 2 / (4 * 15).
    assert evidence.split_agreement() == pytest.approx((1 - 1 + 0.8) / 3)


def test_separated_share_counts_units_two_errors_from_the_cut() -> None:
    constraint = Constraint(1, 4, 0.5)
    evidence = Evidence(constraint, 1e12)
    means = torch.tensor([[1.0, 0.51, 0.49, 0.0]]).double()
    noise = torch.tensor([-1.0, 1.0] * 50).double()[:, None, None]
    evidence.add(means + noise, torch.ones(100, 1, 4, dtype=torch.bool), 0)
    # The cut lies at 0.5 and an error is 0.1: the middle two are 0.1 errors away from it.
    assert evidence.separated_share() == 0.5
    assert evidence.z_scores[0].tolist() == pytest.approx([5, 0.1, -0.1, -5], rel=0.02)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.875])
def test_chance_is_what_noise_gives(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(3)
    constraint = Constraint(1, 4000, sparsity)
    evidence = Evidence(constraint, 1e12)
    falls = torch.randn(600, 1, 4000, generator=generator, dtype=torch.float64)
    evidence.add(falls, torch.ones(600, 1, 4000, dtype=torch.bool), 0)
    assert evidence.separated_share() == pytest.approx(chance_separated_share(sparsity), abs=0.015)


def test_nothing_measured_is_no_evidence() -> None:
    evidence = Evidence(CONSTRAINT, MEMORY)
    assert evidence.split_agreement() is None
    assert evidence.separated_share() == 0
    evidence.add(torch.ones(2, 3, 4).double(), torch.zeros(2, 3, 4, dtype=torch.bool), 0)
    assert evidence.split_agreement() is None
    assert not evidence.scores.any()
    assert bool(evidence.standard_errors.isinf().all())
    assert Evidence(Constraint(3, 4, 1.0), MEMORY).separated_share() is None


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        (EvidenceSummary(None, None), "no evidence was gathered"),
        (EvidenceSummary(0.2, 0.9), "two halves of the sequences order the units differently"),
        (EvidenceSummary(0.9, 0.05), "only 5% of the units differ from the cut"),
    ],
)
def test_what_speaks_against_an_allocation(summary: EvidenceSummary, sentence: str) -> None:
    fault = summary.fault(0.5)
    assert fault is not None
    assert sentence in fault


def test_good_evidence_has_no_fault() -> None:
    assert EvidenceSummary(0.9, 0.6).fault(0.5) is None
