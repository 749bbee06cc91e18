"""The bank of gates: its samples, its state, its metrics, and the gates it returns."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from megaconsa.consa import hard_concrete, philox
from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gate_settings import DECAY_SHARE
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.kernels.attention.head_pattern import HeadPattern
from tests.support.gate_banks import (
    HEADS,
    KINDS,
    LAYERS,
    SEQUENCES,
    SETTINGS,
    backward,
    copy_of,
    expected_sparsity,
    gates_of,
    name,
    sampler,
    spread,
    variants,
)


@pytest.mark.parametrize("settings", KINDS, ids=name)
def test_a_gate_is_the_sample_of_its_place(settings: GateSettings) -> None:
    """A gate is the same for any micro-batch that asks, in any order and any number of times."""
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
    bank = spread(GateBank(settings))
    untouched = spread(GateBank(settings))
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
            assert bank.select(layer, sequences) == HeadPattern(windows)
    assert torch.equal(gates_of(bank)(1, sequences), sampled)
    with pytest.raises(ZeroDivisionError), bank.binarized():
        raise ZeroDivisionError
    assert torch.equal(gates_of(bank)(1, sequences), sampled)


@variants
def test_two_ranks_with_half_of_the_sequences_each_equal_one(settings: GateSettings) -> None:
    """Two ranks with half of the sequences each equal one rank.

    Each rank samples gates for the whole global batch, sees its own half, and the gradients of z
    are summed.
    """
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
    """JSON cannot represent infinity."""
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
