"""The learner alone on noise and faint signals.

It must report noise as noise, and it must find the signals. There are 28 x 8 units and 960 steps,
and the target rises over 300 steps.
"""

from __future__ import annotations

import math

import pytest
import torch

from megaconsa.consa.constraint import Constraint, Scope
from megaconsa.consa.evidence import EvidenceSummary
from megaconsa.consa.gates import GateBank, GateSettings

LAYERS = 28
HEADS = 8
STEPS = 960
WARMUP = 300

scopes = pytest.mark.parametrize("scope", ["per_layer", "global"])


def learn(
    scope: Scope,
    signal: float,
    noise: float,
    seed: int,
    *,
    sequences: int = 1,
    shared: float = 0.0,
    correlation: float = 0.0,
    turns_at: int = 0,
) -> tuple[float, EvidenceSummary]:
    """Runs one learning run.

    Half of each layer's units gain `signal` noise units by opening. The other half lose the same
    amount. Each sequence has independent unit noise.

    shared: size of the noise that all sequences of a step share.
    correlation: correlation of the shared noise from step to step.
    turns_at: the signal has the opposite sign until this step.

    Returns the share of units that the table gets right, and the summary of the evidence.
    """
    generator = torch.Generator().manual_seed(seed)
    constraint = Constraint(LAYERS, HEADS, 0.5, scope=scope)
    settings = GateSettings(constraint, 8, warmup_steps=WARMUP, global_batch=sequences, steps=STEPS)
    bank = GateBank(settings)
    useful = torch.rand(LAYERS, HEADS, generator=generator).argsort(dim=1) < HEADS // 2
    mean = torch.where(useful, signal, -signal)
    wander = torch.zeros(LAYERS, HEADS)
    for step in range(STEPS):
        bank.sample(step)
        fresh = torch.randn(LAYERS, HEADS, generator=generator)
        wander = correlation * wander + math.sqrt(1 - correlation**2) * fresh
        sign = -1 if step < turns_at else 1
        own = torch.randn(sequences, LAYERS, HEADS, generator=generator)
        falls = noise * (sign * mean + shared * wander + own)
        for layer, leaf in enumerate(bank._leaves):
            leaf.grad = -falls[:, layer] / sequences
        bank.update()
    right = float((bank.full() == useful).float().mean())
    return right, bank.summary()


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-1])
@scopes
def test_noise_is_reported_as_noise(scope: Scope, noise: float) -> None:
    _, evidence = learn(scope, 0.0, noise, seed=0)
    assert evidence.separated_share is not None
    assert evidence.split_agreement is not None
    assert evidence.separated_share <= 0.10
    assert abs(evidence.split_agreement) <= 0.2
    assert evidence.fault(0.5) is not None


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@scopes
def test_noise_that_sequences_and_steps_share_is_no_signal(
    scope: Scope, correlation: float
) -> None:
    """Correlated gradients are not independent measurements.

    The weights drift, and the gradients of all sequences drift with them over many steps.
    """
    _, evidence = learn(scope, 0.0, 1e-3, seed=0, sequences=16, shared=0.3, correlation=correlation)
    assert evidence.separated_share is not None
    assert evidence.separated_share <= 0.2
    assert evidence.fault(0.5) is not None


@pytest.mark.parametrize("turns_at", [300, 600])
def test_units_whose_worth_turns_while_they_are_measured_are_told_of(turns_at: int) -> None:
    _, evidence = learn("global", 0.2, 1e-3, seed=0, turns_at=turns_at)
    fault = evidence.fault(0.5)
    assert fault is not None
    assert "the order of the units changed" in fault


@scopes
def test_a_clear_signal_is_found(scope: Scope) -> None:
    right, evidence = learn(scope, 0.1, 1e-3, seed=0)
    assert right >= 0.97
    assert evidence.fault(0.5) is None


@pytest.mark.slow
@scopes
def test_a_faint_signal_is_found_as_well_as_can_be(scope: Scope) -> None:
    """The best possible estimate is the sign of the mean over all steps.

    It is right with probability Phi(s sqrt(steps)) = 82 %. The mean is over sixteen seeds, because
    the share of 224 units varies by 2.6 points.
    """
    shares = [learn(scope, 0.03, 1e-3, seed)[0] for seed in range(16)]
    best = 0.5 * (1 + math.erf(0.03 * math.sqrt(STEPS) / math.sqrt(2)))
    assert sum(shares) / len(shares) >= best - 0.03
