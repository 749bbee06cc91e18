"""Which units the rules keep full.

The test of the command rule-masks covers names and shares.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError

properties = settings(max_examples=100, deadline=None, derandomize=True)


UNITS: list[tuple[Granularity, Scope]] = [
    ("kv_head", "per_layer"),
    ("kv_head", "global"),
    ("layer", "global"),
]


def drawn(allocation: Allocation) -> list[str]:
    """Draws each layer as a string, from the bottom. F is a full head."""
    return ["".join("F" if full else "." for full in row) for row in allocation.full]


@st.composite
def constraints(draw: st.DrawFn) -> Constraint:
    layers = draw(st.integers(1, 8))
    heads = draw(st.integers(1, 8))
    granularity, scope = draw(st.sampled_from(UNITS))
    floor = 0
    if (granularity, scope) == ("kv_head", "global"):
        floor = draw(st.integers(0, heads))
    units = Constraint(layers, heads, 0.0, granularity, scope).units
    windowed = draw(st.integers(0, units - floor * layers))
    return Constraint(layers, heads, windowed / units, granularity, scope, floor)


def test_interleaved_puts_the_full_layer_last() -> None:
    assert drawn(rules.interleaved(7, 2, 16, 2)) == ["..", "..", "FF", "..", "..", "FF", ".."]
    assert rules.interleaved(7, 2, 16, 2).target_sparsity == pytest.approx(5 / 7)


def test_bottom_swa_puts_the_windows_below() -> None:
    assert drawn(rules.bottom_swa(4, 2, 16, 0.75)) == ["..", "..", "..", "FF"]


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.0, "FFFFFFFF"),
        (0.125, ".FFFFFFF"),
        (0.25, ".FFFFFF."),
        (0.5, "..FFFF.."),
        (0.625, "...FFF.."),
        (0.875, "....F..."),
        (1.0, "........"),
    ],
)
def test_middle_puts_the_windows_at_both_ends(sparsity: float, expected: str) -> None:
    """The model has eight layers.

    The bottom gets one more if the number of windowed layers is odd.
    """
    table = rules.middle(8, 2, 16, sparsity)
    assert drawn(table) == [kind * 2 for kind in expected]
    assert (table.granularity, table.scope, table.target_sparsity) == ("layer", "global", sparsity)


def test_head_share_keeps_the_first_heads() -> None:
    assert drawn(rules.head_share(2, 4, 16, 0.75)) == ["F...", "F..."]
    assert rules.head_share(2, 4, 16, 0.75).origin == {"rule": "head-share"}


def test_head_share_with_a_seed_draws_in_each_layer() -> None:
    table = rules.head_share(28, 8, 16, 0.75, seed=1)
    assert [sum(row) for row in table.full] == [2] * 28
    assert len(set(table.full)) > 10
    assert table.origin == {"rule": "head-share", "seed": 1}
    assert rules.head_share(28, 8, 16, 0.75, seed=1) == table
    assert rules.head_share(28, 8, 16, 0.75, seed=2).full != table.full


@properties
@given(constraints(), st.integers(0, 2**32 - 1))
def test_random_meets_every_constraint(constraint: Constraint, seed: int) -> None:
    table = rules.random(constraint, 16, seed)
    full = torch.tensor(table.full)
    units = full[:, : constraint.units_per_layer]
    assert torch.equal(constraint.heads(units), full)
    assert constraint.rows(units).sum(dim=1).tolist() == [constraint.full] * constraint.count
    assert int(units.sum(dim=1).min()) >= constraint.floor
    assert (table.granularity, table.scope) == (constraint.granularity, constraint.scope)
    assert table.target_sparsity == constraint.sparsity
    assert rules.random(constraint, 16, seed) == table


def test_random_draws_the_same_on_every_machine() -> None:
    table = rules.random(Constraint(4, 4, 0.5), 16, 0)
    assert drawn(table) == ["F..F", "FF..", "F.F.", ".FF."]
    assert table.origin == {"rule": "random", "seed": 0}


def test_random_units_are_equally_likely() -> None:
    """Every unit is full in half of 400 draws, within four standard errors."""
    constraint = Constraint(3, 4, 0.5, "kv_head", "global")
    total = torch.zeros(3, 4)
    for seed in range(400):
        total += torch.tensor(rules.random(constraint, 16, seed).full)
    assert bool(((total / 400 - 0.5).abs() < 4 * 0.5 / 400**0.5).all())


def test_what_a_rule_cannot_make_is_refused() -> None:
    with pytest.raises(InputError, match="ratio=0 of the interleaved rule must be at least 1"):
        rules.interleaved(4, 2, 16, 0)
    with pytest.raises(InputError, match="cannot be met by 4 layers"):
        rules.bottom_swa(4, 2, 16, 0.3)
    with pytest.raises(InputError, match="cannot be met by 4 layers"):
        rules.middle(4, 2, 16, 0.3)
    with pytest.raises(InputError, match="rule random needs a seed"):
        rules.build("random", 4, 2, 16)
