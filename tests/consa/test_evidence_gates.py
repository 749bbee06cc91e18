"""Gates that measure first and decide later: their values over a run, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gates import GateBank, GateSettings

STEPS = 100
WARMUP = 30
SEQUENCES = 4
CONSTRAINTS = [
    Constraint(5, 8, 0.75),
    Constraint(5, 8, 0.5, scope="global"),
    Constraint(5, 8, 0.5, scope="global", floor=1),
    Constraint(8, 4, 0.25, granularity="layer", scope="global"),
]


def name(constraint: Constraint) -> str:
    return f"{constraint.granularity}-{constraint.scope}-{constraint.floor}"


constraints = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)


def course(
    constraint: Constraint, benefit: Tensor, noise: float = 1.0
) -> tuple[GateBank, list[Tensor]]:
    """Runs a whole learning run. Opening a unit lowers the loss by its benefit, under noise.

    benefit: (layers, units).
    Returns the bank and z of each step, (layers, units).
    """
    generator = torch.Generator().manual_seed(0)
    settings = GateSettings(constraint, 8, warmup_steps=WARMUP, global_batch=SEQUENCES, steps=STEPS)
    bank = GateBank(settings)
    history = []
    for step in range(STEPS):
        bank.sample(step)
        z = torch.stack([leaf.detach() for leaf in bank._leaves], dim=1)
        assert bool((z == z[:1]).all())
        history.append(z[0].double())
        scatter = noise * torch.randn(SEQUENCES, *constraint.shape, generator=generator)
        for layer, leaf in enumerate(bank._leaves):
            leaf.grad = -(benefit[layer] + scatter[:, layer]) / SEQUENCES
        metrics = bank.update()
        assert metrics["expected_sparsity"] == pytest.approx(metrics["target_sparsity"], abs=1e-9)
    return bank, history


def random_benefit(constraint: Constraint) -> Tensor:
    return torch.randn(constraint.shape, generator=torch.Generator().manual_seed(1))


@constraints
def test_every_constraint_meets_its_target_in_every_step(constraint: Constraint) -> None:
    bank, history = course(constraint, random_benefit(constraint))
    for step, z in enumerate(history):
        target = torch.full((constraint.count,), bank.settings.target(step)).double()
        torch.testing.assert_close(constraint.sparsities(z), target, rtol=0, atol=1e-7)


@constraints
def test_all_units_are_measured_under_equal_conditions_before_the_closing_stage(
    constraint: Constraint,
) -> None:
    _, history = course(constraint, random_benefit(constraint))
    for z in history[: int(0.75 * STEPS)]:
        rows = constraint.rows(z)
        assert bool((rows == rows[:, :1]).all())


@constraints
def test_gates_end_at_0_and_1_as_the_table_says(constraint: Constraint) -> None:
    bank, history = course(constraint, random_benefit(constraint))
    for z in history[-int(0.05 * STEPS) :]:
        assert torch.equal(z.bool(), constraint.top_k(bank.gates.scores))
        assert bool(((z == 0) | (z == 1)).all())


def test_undecided_units_share_one_value_and_the_clearest_are_decided_first() -> None:
    constraint = Constraint(1, 40, 0.5)
    benefit = torch.linspace(-1, 1, 40)[None]
    _, history = course(constraint, benefit, noise=0.1)
    middle = history[int(0.83 * STEPS)][0]
    decided = (middle == 0) | (middle == 1)
    assert 0 < int(decided.sum()) < 40
    # Units close to the cut in the middle are undecided. Decided units lie farther from it.
    assert not decided[18:22].any()
    distance = benefit[0].abs()
    assert float(distance[decided].mean()) > 1.3 * float(distance[~decided].mean())
    undecided = middle[18:22]
    assert bool((undecided == undecided[0]).all())


def test_a_unit_can_come_back() -> None:
    """A unit that is closing opens again when the evidence changes sign."""
    constraint = Constraint(1, 4, 0.5)
    bank = GateBank(GateSettings(constraint, 8, warmup_steps=10, global_batch=2, steps=STEPS))
    history = []
    for step in range(STEPS):
        bank.sample(step)
        history.append(bank._leaves[0][0].detach().clone())
        # Unit 2 is the last to be decided. From step 80 it gains much more than before.
        benefit = torch.tensor([2.0, 1.0, 0.9 if step < 80 else 40.0, -1.0])
        bank._leaves[0].grad = -(benefit + torch.tensor([[0.1], [-0.1]])) / 2
        bank.update()
    before = history[80]
    assert not bool(before[2] == 1)
    assert history[-1].tolist() == [1, 0, 1, 0]


def test_decided_units_keep_their_evidence() -> None:
    """A decided unit is no longer measured.

    Its gradient is 0 by definition. Counted as a measurement, it would pull every score towards 0.
    """
    constraint = Constraint(1, 8, 0.5)
    benefit = torch.linspace(1, 2, 8)[None]
    bank, _ = course(constraint, benefit, noise=0.01)
    torch.testing.assert_close(bank.evidence.scores.float(), benefit, rtol=0, atol=0.02)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_to_choose(sparsity: float) -> None:
    constraint = Constraint(2, 4, sparsity)
    bank, history = course(constraint, random_benefit(constraint))
    assert bool((history[-1] == 1 - sparsity).all())
    assert bank.summary().separated_share is None


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_short_runs_end_with_the_table(steps: int) -> None:
    constraint = Constraint(2, 4, 0.5, "kv_head", "global")
    bank = GateBank(GateSettings(constraint, 8, warmup_steps=0, global_batch=2, steps=steps))
    for step in range(steps):
        bank.sample(step)
        for layer, leaf in enumerate(bank._leaves):
            leaf.grad = -torch.arange(8.0).view(2, 4) * (layer + 1)
        bank.update()
    assert sorted(set(bank.gates.z.flatten().tolist())) == [0.0, 1.0]
