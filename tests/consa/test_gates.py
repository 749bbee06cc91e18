"""The bank of gates: its step against one autograd graph, its state, and what it hands to the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.consa import hard_concrete, philox
from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.consa.sampled_gates import DECAY_SHARE, GRADIENT_CLIPPING, SampledGates

LAYERS, HEADS, SEQUENCES = 3, 4, 6
CONSTRAINT = Constraint(LAYERS, HEADS, 0.5)
CONSTRAINTS = [
    CONSTRAINT,
    Constraint(LAYERS, HEADS, 0.25, scope="global"),
    Constraint(LAYERS, HEADS, 2 / 3, granularity="layer", scope="global"),
]
SETTINGS = GateSettings(
    CONSTRAINT,
    8,
    "paper",
    learning_rate=0.15,
    initial=0.3,
    warmup_steps=3,
    seed=9,
    global_batch=SEQUENCES,
    steps=20,
)
KINDS = [replace(SETTINGS, constraint=constraint) for constraint in CONSTRAINTS]
VARIANTS = KINDS + [replace(kind, controller="evidence") for kind in KINDS]

Select = Callable[[int, Tensor], Tensor]
Descent = tuple[Tensor, Tensor, float]
Spied = Callable[[GateBank], list[Descent]]


def name(settings: GateSettings) -> str:
    return f"{settings.constraint.granularity}-{settings.constraint.scope}-{settings.controller}"


variants = pytest.mark.parametrize("settings", VARIANTS, ids=name)
sampled = pytest.mark.parametrize("settings", KINDS, ids=name)


def loss(select: Select, sequences: Tensor, scale: float = 0.02) -> Tensor:
    """A small model: each layer mixes a sequence's state by weights of its own and scales it by the gates of the heads."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(LAYERS, HEADS, HEADS, generator=generator)
    state = torch.randn(SEQUENCES, HEADS, generator=generator)[sequences]
    for layer in range(LAYERS):
        state = state + torch.tanh(state @ mixing[layer]) * select(layer, sequences)
    return scale * state.square().sum()


def gates_of(bank: GateBank) -> Select:
    def select(layer: int, sequences: Tensor) -> Tensor:
        window, gate = bank.select(layer, sequences)
        assert window == bank.settings.window
        assert gate is not None
        assert gate.shape == (len(sequences), HEADS)
        assert gate.dtype == torch.float32
        return gate

    return select


def backward(bank: GateBank, micro_batches: Sequence[Sequence[int]], scale: float = 0.02) -> None:
    for sequences in micro_batches:
        loss(gates_of(bank), torch.tensor(sequences), scale).backward()


def spread(bank: GateBank) -> GateBank:
    """Gives the units different values, so that none stands for another."""
    if bank.settings.controller == "evidence":
        return bank
    log_alpha = sampler(bank).log_alpha
    with torch.no_grad():
        log_alpha += torch.linspace(-1, 1, log_alpha.numel()).reshape(log_alpha.shape)
    return bank


def sampler(bank: GateBank) -> SampledGates:
    assert isinstance(bank.gates, SampledGates)
    return bank.gates


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}


def expected_sparsity(log_alpha: Tensor, settings: GateSettings) -> Tensor:
    """By the formula of the method, one number per constraint."""
    closed = 1 - torch.sigmoid(log_alpha - (2 / 3) * math.log(0.1 / 1.1))
    return closed.mean(dim=1) if settings.constraint.scope == "per_layer" else closed.mean()[None]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Lets a bank tell what it hands to its controller at each step: the loss's gradient, the penalty's, the learning rate."""

    def spy(bank: GateBank) -> list[Descent]:
        calls: list[Descent] = []
        descend = sampler(bank).lagrangian.descend

        def record(loss_gradient: Tensor, penalty_gradient: Tensor, learning_rate: float) -> None:
            calls.append((loss_gradient.clone(), penalty_gradient.clone(), learning_rate))
            descend(loss_gradient, penalty_gradient, learning_rate)

        monkeypatch.setattr(sampler(bank).lagrangian, "descend", record)
        return calls

    return spy


@sampled
@pytest.mark.parametrize("scale", [0.02, 0.5], ids=["small", "clipped"])
def test_updates_equal_one_graph(settings: GateSettings, scale: float, spied: Spied) -> None:
    """Loss, samples and penalty in one autograd graph with torch's own Adam, against micro-batches that accumulate into leaves."""
    bank = spread(GateBank(settings))
    calls = spied(bank)
    log_alpha = sampler(bank).log_alpha.detach().clone().requires_grad_()
    adam = torch.optim.Adam([log_alpha], betas=(0.9, 0.999))
    constraints = LAYERS if settings.constraint.scope == "per_layer" else 1
    lambda_ = torch.zeros(constraints)
    phi = torch.zeros(constraints)
    ascent = torch.optim.Adam([lambda_, phi], betas=(0.9, 0.999), maximize=True)
    sequences = torch.arange(SEQUENCES)
    norms = []
    for step in (0, 1, 2, 17, 19):  # the last two while the learning rate falls
        target = settings.constraint.sparsity * min(1.0, (step + 1) / 3)
        uniform = philox.uniform(9, step, sequences, LAYERS, settings.constraint.units_per_layer)
        z = hard_concrete.sample(log_alpha, uniform)
        error = expected_sparsity(log_alpha, settings) - target
        penalty = (lambda_ * error + phi * error**2).sum()

        def gate(layer: int, rows: Tensor, z: Tensor = z) -> Tensor:
            return z[rows, layer].expand(-1, HEADS)

        whole = loss(gate, sequences, scale) + penalty
        (penalty_gradient,) = torch.autograd.grad(penalty, log_alpha, retain_graph=True)
        loss_gradient = torch.autograd.grad(whole, log_alpha)[0] - penalty_gradient
        norm = float(loss_gradient.norm())
        norms.append(norm)
        loss_gradient /= max(1.0, norm / GRADIENT_CLIPPING)
        adam.param_groups[0]["lr"] = sampler(bank).rate(step)
        log_alpha.grad = loss_gradient + penalty_gradient
        adam.step()
        error = expected_sparsity(log_alpha.detach(), settings) - target
        ascent.param_groups[0]["lr"] = sampler(bank).rate(step)
        lambda_.grad, phi.grad = error, error**2
        ascent.step()

        bank.sample(step)
        backward(bank, [[4, 1], [0], [5, 3, 2]], scale)
        metrics = bank.update()
        torch.testing.assert_close(calls[-1][0], loss_gradient, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(calls[-1][1], penalty_gradient, rtol=1e-5, atol=2e-6)
        assert calls[-1][2] == sampler(bank).rate(step)
        torch.testing.assert_close(sampler(bank).log_alpha, log_alpha, rtol=0, atol=5e-6)
        torch.testing.assert_close(sampler(bank).lagrangian.lambda_, lambda_, rtol=0, atol=5e-6)
        torch.testing.assert_close(sampler(bank).lagrangian.phi, phi, rtol=0, atol=5e-6)
        assert metrics["gate_grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["penalty"] == pytest.approx(penalty.item(), rel=1e-5, abs=1e-6)
    assert (max(norms) < GRADIENT_CLIPPING) if scale == 0.02 else (min(norms) > GRADIENT_CLIPPING)


@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_without_a_loss_only_the_penalty_has_a_gradient(
    settings: GateSettings, spied: Spied
) -> None:
    """(lambda + 2 phi error) d error / d log_alpha, with d error = -p (1 - p) / units."""
    bank = spread(GateBank(settings))
    calls = spied(bank)
    sampler(bank).lagrangian.lambda_.copy_(
        torch.linspace(0.01, 0.02, len(sampler(bank).lagrangian.lambda_))
    )
    sampler(bank).lagrangian.phi.fill_(0.7)
    before = sampler(bank).log_alpha.detach().clone()
    error = expected_sparsity(before, settings) - settings.constraint.sparsity / 3
    p = torch.sigmoid(before - (2 / 3) * math.log(0.1 / 1.1))
    slope = sampler(bank).lagrangian.lambda_ + 2 * 0.7 * error
    bank.sample(0)
    assert bank.update()["gate_grad_norm"] == 0
    ((loss_gradient, penalty_gradient, _),) = calls
    assert not loss_gradient.any()  # a norm of 0 must not become NaN by the clipping
    expected = -slope[:, None] * p * (1 - p) / settings.constraint.units
    torch.testing.assert_close(penalty_gradient, expected, rtol=1e-5, atol=1e-8)
    assert bool(sampler(bank).log_alpha.isfinite().all())


@sampled
def test_only_the_losss_gradient_is_clipped(settings: GateSettings, spied: Spied) -> None:
    bank = spread(GateBank(settings))
    calls = spied(bank)
    sampler(bank).lagrangian.lambda_.fill_(1e4)
    bank.sample(0)
    backward(bank, [range(SEQUENCES)], scale=50.0)
    metrics = bank.update()
    ((loss_gradient, penalty_gradient, _),) = calls
    assert metrics["gate_grad_norm"] > 2 * GRADIENT_CLIPPING
    assert float(loss_gradient.norm()) == pytest.approx(GRADIENT_CLIPPING, rel=1e-5)
    assert float(penalty_gradient.norm()) > 2 * GRADIENT_CLIPPING


def test_clipping_keeps_the_direction_and_comes_after_the_sum_over_ranks(spied: Spied) -> None:
    """Two ranks whose shares stay below the limit each, but not together."""
    plain = spread(GateBank(SETTINGS))
    plain.sample(0)
    backward(plain, [range(SEQUENCES)])
    norm = plain.update()["gate_grad_norm"]
    assert norm < GRADIENT_CLIPPING
    factor = 1 + GRADIENT_CLIPPING / norm

    bank = spread(GateBank(SETTINGS))
    calls = spied(bank)
    bank.sample(0)
    backward(bank, [range(SEQUENCES)])
    metrics = bank.update(lambda gradient: gradient.mul_(factor))
    assert metrics["gate_grad_norm"] == pytest.approx(norm + GRADIENT_CLIPPING, rel=1e-5)
    assert float(calls[0][0].norm()) == pytest.approx(GRADIENT_CLIPPING, rel=1e-5)


@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_a_gate_is_the_sample_of_its_place(settings: GateSettings) -> None:
    """Whatever micro-batch asks, in any order, again and again."""
    bank = spread(GateBank(settings))
    bank.sample(7)
    expected = hard_concrete.sample(
        sampler(bank).log_alpha.detach(),
        philox.uniform(9, 7, torch.arange(SEQUENCES), LAYERS, settings.constraint.units_per_layer),
    ).expand(-1, -1, HEADS)
    for layer, rows in product((2, 0, 2, 1), ([5], [3, 0], [0, 1, 2, 3, 4, 5])):
        assert torch.equal(gates_of(bank)(layer, torch.tensor(rows)), expected[rows, layer])


@variants
def test_state_restores_bitwise_the_same_next_steps(settings: GateSettings) -> None:
    def advance(bank: GateBank, steps: range) -> list[dict[str, Any]]:
        rows = []
        for step in steps:
            bank.sample(step)
            backward(bank, [[0, 1, 2], [3, 4, 5]])
            rows.append(bank.update())
        return rows

    bank = spread(GateBank(settings))
    advance(bank, range(3))
    saved = copy_of(bank.state())
    expected = advance(bank, range(3, 6))
    resumed = GateBank(settings)
    resumed.load_state(saved)
    assert advance(resumed, range(3, 6)) == expected
    states = bank.state(), resumed.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], saved[key]) for key in saved)


def test_state_of_another_kind_is_refused() -> None:
    evidence = GateBank(replace(SETTINGS, controller="evidence"))
    bank = GateBank(SETTINGS)
    with pytest.raises(ValueError, match=r"adam\.0\.exp_avg.*ascent\.0\.exp_avg"):
        bank.load_state(evidence.state())
    with pytest.raises(ValueError, match=r"adam\.0\.exp_avg.*ascent\.0\.exp_avg"):
        evidence.load_state(bank.state())
    with pytest.raises(ValueError, match="log_alpha"):
        bank.load_state({key: value for key, value in bank.state().items() if key != "log_alpha"})


def test_update_needs_a_sample_for_each_step() -> None:
    bank = GateBank(SETTINGS)
    with pytest.raises(RuntimeError, match=r"before GateBank\.sample"):
        bank.update()
    bank.sample(0)
    bank.update()
    with pytest.raises(RuntimeError, match=r"before GateBank\.sample"):
        bank.update()


@variants
def test_a_discarded_step_leaves_no_trace(settings: GateSettings) -> None:
    bank, untouched = spread(GateBank(settings)), spread(GateBank(settings))
    before = copy_of(bank.state())
    bank.sample(0)
    backward(bank, [range(SEQUENCES)])
    bank.discard()
    assert all(torch.equal(value, before[key]) for key, value in bank.state().items())
    with pytest.raises(RuntimeError, match=r"before GateBank\.sample"):
        bank.update()
    for each in (bank, untouched):
        each.sample(1)
        backward(each, [range(SEQUENCES)])
    assert bank.update() == untouched.update()
    states = bank.state(), untouched.state()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_binarized_hands_out_the_exact_table(settings: GateSettings) -> None:
    bank = spread(GateBank(settings))
    bank.sample(0)
    sequences = torch.arange(SEQUENCES)
    sampled = gates_of(bank)(1, sequences)
    with bank.binarized() as table:
        assert table == bank.allocation()
        assert table.sparsity == pytest.approx(settings.constraint.sparsity)
        for layer in range(LAYERS):
            windows = tuple(FULL_WINDOW if full else 8 for full in bank.full()[layer].tolist())
            assert bank.select(layer, sequences) == (windows, None)
    assert torch.equal(gates_of(bank)(1, sequences), sampled)
    with pytest.raises(ZeroDivisionError), bank.binarized():
        raise ZeroDivisionError
    assert torch.equal(gates_of(bank)(1, sequences), sampled)


@variants
def test_two_ranks_with_half_of_the_sequences_each_equal_one(settings: GateSettings) -> None:
    """Each rank samples the whole global batch, sees its own half, and sums the gradient of z."""
    single = spread(GateBank(settings))
    ranks = [spread(GateBank(settings)) for _ in range(2)]
    halves = ([0, 1, 2], [3, 4, 5])
    for step in range(3):
        single.sample(step)
        backward(single, halves)
        expected = single.update()

        shares = []
        for rank, half in zip(ranks, halves, strict=True):
            rank.sample(step)
            backward(rank, [half])
            shares.append(rank.gradient().clone())
        assert not torch.equal(*shares)
        for rank in ranks:
            rank._gradient = shares[0] + shares[1]
            metrics = rank.update()
            for key, value in single.state().items():
                torch.testing.assert_close(rank.state()[key], value, rtol=1e-5, atol=2e-6)
            assert metrics["expected_sparsity"] == pytest.approx(
                expected["expected_sparsity"], abs=1e-6
            )
        states = [rank.state() for rank in ranks]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_metrics_of_a_step() -> None:
    settings = replace(SETTINGS, warmup_steps=0)
    bank = GateBank(settings)
    sampler(bank).learning_rate = 1e-9
    values = torch.tensor([[9.0, -9.0, 0.5, -0.5], [0.1, 0.2, 0.3, 0.4], [-9.0, -8.0, -7.0, 9.0]])
    with torch.no_grad():
        sampler(bank).log_alpha.copy_(values)
    bank.sample(0)
    z = torch.stack([gates_of(bank)(layer, torch.arange(SEQUENCES)) for layer in range(LAYERS)])
    metrics = bank.update()
    expected = expected_sparsity(values, settings)
    assert metrics["target_sparsity"] == 0.5
    assert metrics["expected_sparsity"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert metrics["layer_expected_sparsity"] == pytest.approx(expected.tolist(), rel=1e-6)
    assert metrics["sampled_sparsity"] == pytest.approx(float((z == 0).float().mean()), rel=1e-6)
    assert 0 < metrics["sampled_sparsity"] < 1
    assert metrics["binarized_sparsity"] == 0.5
    assert metrics["threshold_sparsity"] == pytest.approx(5 / 12)
    assert metrics["decided_share"] == pytest.approx(6 / 12)
    assert metrics["cut_margin"] == pytest.approx(0.1, rel=1e-5)
    assert bank.full().tolist() == [
        [True, False, True, False],
        [False, False, True, True],
        [False, False, True, True],
    ]


def test_cut_margin_is_null_where_nothing_is_cut() -> None:
    """JSON has no infinity."""
    bank = GateBank(replace(SETTINGS, constraint=Constraint(LAYERS, HEADS, 1.0)))
    bank.sample(0)
    assert bank.update()["cut_margin"] is None


def test_target_rises_linearly_over_the_warmup() -> None:
    assert [SETTINGS.target(step) for step in range(5)] == pytest.approx(
        [0.5 / 3, 1 / 3, 0.5, 0.5, 0.5]
    )
    assert replace(SETTINGS, warmup_steps=0).target(0) == 0.5


def test_learning_rate_falls_to_zero_over_the_last_part() -> None:
    decay = round(DECAY_SHARE * SETTINGS.steps)
    assert 1 < decay < SETTINGS.steps / 2
    gates = sampler(GateBank(SETTINGS))
    rates = [gates.rate(step) for step in range(SETTINGS.steps + 1)]
    assert rates[:-decay] == [0.15] * (SETTINGS.steps + 1 - decay)
    assert rates[-decay:] == pytest.approx([0.15 * left / decay for left in range(decay)][::-1])
    assert rates[-1] == 0


def test_learning_rate_of_runs_too_short_to_decay() -> None:
    short = replace(SETTINGS, steps=4, learning_rate=0.6)
    assert sampler(GateBank(short)).rate(3) == 0.6
