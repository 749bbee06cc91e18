"""The target of the gates: exact counts, the floor, the cut of the scores, and refusals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError

properties = settings(max_examples=200, deadline=None, derandomize=True)

SCORES = torch.tensor([[4.0, 1.0, 3.0, 0.0], [8.0, 2.0, 2.5, -9.0]], dtype=torch.float64)
INFINITY = float("inf")

UNITS: list[tuple[Granularity, Scope]] = [
    ("kv_head", "per_layer"),
    ("kv_head", "global"),
    ("layer", "global"),
]
"""Every valid pair of granularity and scope."""


@dataclass(frozen=True)
class Case:
    constraint: Constraint
    scores: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws any constraint with scores for it.

    The scores come from a few values so that many of them tie.
    """
    granularity, scope = draw(st.sampled_from(UNITS))
    layers = draw(st.integers(1, 6))
    heads = draw(st.integers(1, 8))
    dense = Constraint(layers, heads, 0.0, granularity, scope)
    floor = 0
    if (granularity, scope) == ("kv_head", "global"):
        floor = draw(st.integers(0, heads))
    windowed = draw(st.integers(0, dense.units - floor * layers))
    constraint = Constraint(layers, heads, windowed / dense.units, granularity, scope, floor)
    few = st.sampled_from([-1.5, -1e-30, 0.0, 1e-30, 2.5])
    row = st.lists(few, min_size=dense.units_per_layer, max_size=dense.units_per_layer)
    scores = draw(st.lists(row, min_size=layers, max_size=layers))
    return Case(constraint, torch.tensor(scores, dtype=torch.float64, requires_grad=True))


@properties
@given(cases())
def test_top_k_meets_every_count_and_the_floor(case: Case) -> None:
    constraint = case.constraint
    table = constraint.top_k(case.scores)
    assert table.shape == case.scores.shape == constraint.shape
    full = constraint.rows(table).sum(dim=1)
    assert full.tolist() == [constraint.full] * constraint.count
    assert int(table.sum(dim=1).min()) >= constraint.floor
    assert 1 - float(table.double().mean()) == pytest.approx(constraint.sparsity)


@properties
@given(cases())
def test_top_k_keeps_the_largest(case: Case) -> None:
    """Compares top_k with a plain sort.

    The units that the floor guarantees come first. Among ties, the lower index stays full.
    """
    constraint = case.constraint
    rows = case.scores.tolist()
    width = constraint.units_per_layer

    def by_score(unit: int) -> tuple[float, int]:
        return -rows[unit // width][unit % width], unit

    guaranteed: list[int] = []
    for layer in range(constraint.num_layers):
        units = range(layer * width, (layer + 1) * width)
        guaranteed += sorted(units, key=by_score)[: constraint.floor]
    expected: list[int] = []
    for group in range(constraint.count):
        units = range(group * constraint.units, (group + 1) * constraint.units)
        best = sorted(units, key=lambda unit: (unit not in guaranteed, by_score(unit)))
        expected += best[: constraint.full]
    table = constraint.top_k(case.scores).flatten()
    assert table.nonzero().flatten().tolist() == sorted(expected)


@properties
@given(cases())
def test_the_cut_lies_between_full_and_windowed(case: Case) -> None:
    """Full units score at least the cut and windowed units at most.

    Units that are full because of the floor are exceptions.
    """
    constraint = case.constraint
    table = constraint.rows(constraint.top_k(case.scores))
    scores = constraint.rows(case.scores.detach())
    cut = constraint.cut(case.scores)[:, None]
    assert cut.shape == (constraint.count, 1)
    assert bool((scores[~table] <= cut.expand_as(scores)[~table]).all())
    if constraint.floor == 0:
        assert bool((scores[table] >= cut.expand_as(scores)[table]).all())
    assert constraint.margin(case.scores) >= 0


def test_cut_and_margin() -> None:
    def both(sparsity: float, granularity: Granularity, scope: Scope) -> tuple[list[float], float]:
        constraint = Constraint(2, 4, sparsity, granularity, scope)
        scores = SCORES
        if granularity == "layer":
            scores = SCORES[:, :1]
        return constraint.cut(scores).tolist(), constraint.margin(scores)

    assert both(0.5, "kv_head", "per_layer") == ([2.0, 2.25], 0.5)
    assert both(0.25, "kv_head", "per_layer") == ([0.5, -3.5], 1.0)
    assert both(0.5, "kv_head", "global") == ([2.25], 0.5)
    assert both(0.25, "kv_head", "global") == ([0.5], 1.0)
    assert both(0.5, "layer", "global") == ([6.0], 4.0)
    assert both(0.0, "kv_head", "per_layer") == ([-INFINITY] * 2, INFINITY)
    assert both(1.0, "kv_head", "per_layer") == ([INFINITY] * 2, INFINITY)


def test_the_floor_does_not_move_the_cut() -> None:
    """The second layer keeps the best of its low-scoring units.

    The cut separates the other units.
    """
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [-5.0, -6.0, -7.0, -8.0]])
    constraint = Constraint(2, 4, 0.5, "kv_head", "global", floor=1)
    table = constraint.top_k(scores)
    assert table.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert constraint.cut(scores).tolist() == [1.5]
    assert constraint.margin(scores) == 1.0


def test_a_floor_that_takes_every_full_unit() -> None:
    scores = torch.tensor([[4.0, 3.0], [-5.0, -6.0]])
    constraint = Constraint(2, 2, 0.5, "kv_head", "global", floor=1)
    assert constraint.top_k(scores).tolist() == [[True, False], [True, False]]
    # A windowed unit of the first layer scores above the full one of the second.
    assert constraint.cut(scores).tolist() == [3.0]
    assert constraint.margin(scores) == 0.0
    apart = torch.tensor([[4.0, -3.0], [5.0, -6.0]])
    assert constraint.cut(apart).tolist() == [0.5]
    assert constraint.margin(apart) == 7.0


def test_counts() -> None:
    per_layer = Constraint(28, 8, 0.75)
    assert (per_layer.count, per_layer.units, per_layer.windowed, per_layer.full) == (28, 8, 6, 2)
    everywhere = Constraint(28, 8, 0.75, "kv_head", "global")
    assert (everywhere.count, everywhere.units, everywhere.windowed) == (1, 224, 168)
    layers = Constraint(28, 8, 0.75, "layer", "global")
    assert (layers.shape, layers.count, layers.units, layers.windowed) == ((28, 1), 1, 28, 21)


def test_expected_sparsity_of_each_constraint() -> None:
    probability = torch.tensor([[1.0, 0.5], [0.0, 0.25]])
    assert Constraint(2, 2, 0.5).sparsities(probability).tolist() == [0.25, 0.875]
    assert Constraint(2, 2, 0.5, "kv_head", "global").sparsities(probability).tolist() == [0.5625]


def test_heads_of_layers() -> None:
    table = torch.tensor([[True], [False]])
    layers = Constraint(2, 3, 0.5, "layer", "global")
    assert layers.heads(table).tolist() == [[True] * 3, [False] * 3]
    heads = torch.tensor([[True, False], [False, True]])
    assert Constraint(2, 2, 0.5).heads(heads).tolist() == heads.tolist()


@pytest.mark.parametrize(("granularity", "scope"), UNITS)
def test_every_sparsity_of_the_paper_is_accepted(granularity: Granularity, scope: Scope) -> None:
    """A sparsity may be given in full precision or rounded to seven digits."""
    units = Constraint(28, 8, 0.0, granularity, scope).units
    for windowed in range(units + 1):
        assert Constraint(28, 8, windowed / units, granularity, scope).windowed == windowed
        rounded = float(f"{windowed / units:.7f}")
        assert Constraint(28, 8, rounded, granularity, scope).windowed == windowed


OF_A_LAYER = "cannot be met by the 4 KV heads of a layer; possible are 0, 0.25, 0.5, 0.75, 1"
OF_ALL = "cannot be met by 20 KV heads; multiples of 1/20 are possible, near it"
OF_LAYERS = "cannot be met by 5 layers; possible are 0, 0.2, 0.4, 0.6, 0.8, 1"
LAYER = "allocation.scope=per_layer cannot hold with allocation.granularity=layer"


@pytest.mark.parametrize(
    ("sparsity", "granularity", "scope", "message"),
    [
        (0.3, "kv_head", "per_layer", f"allocation.sparsity=0.3 {OF_A_LAYER}"),
        (0.5, "layer", "global", OF_LAYERS),
        (0.51, "kv_head", "global", f"{OF_ALL} 0.4, 0.45, 0.5, 0.55, 0.6"),
        (0.99, "kv_head", "global", f"{OF_ALL} 0.9, 0.95, 1"),
        (0.5001, "kv_head", "per_layer", "possible are"),
        (-0.25, "kv_head", "per_layer", "allocation.sparsity=-0.25 must lie between 0 and 1"),
        (1.25, "kv_head", "per_layer", "must lie between 0 and 1"),
        (float("nan"), "kv_head", "per_layer", "allocation.sparsity=nan must lie between 0 and 1"),
        (INFINITY, "kv_head", "global", "must lie between 0 and 1"),
        (0.4, "layer", "per_layer", LAYER),
    ],
)
def test_what_cannot_be_met_is_refused(
    sparsity: float,
    granularity: Granularity,
    scope: Scope,
    message: str,
) -> None:
    """The model has five layers of four KV heads."""
    with pytest.raises(InputError) as caught:
        Constraint(5, 4, sparsity, granularity, scope)
    assert message in str(caught.value)


NEEDS = "floor=1 needs allocation.scope=global and allocation.granularity=kv_head"
TOO_MUCH = "floor=2 keeps 10 units full, but allocation.sparsity=0.6 leaves 8; lower the floor"


@pytest.mark.parametrize(
    ("granularity", "scope", "floor", "message"),
    [
        ("kv_head", "per_layer", 1, NEEDS),
        ("layer", "global", 1, NEEDS),
        ("kv_head", "global", 5, "floor=5 must lie between 0 and the 4 KV heads of a layer"),
        ("kv_head", "global", -1, "floor=-1 must lie between 0 and the 4 KV heads of a layer"),
        ("kv_head", "global", 2, TOO_MUCH),
    ],
)
def test_floors_that_are_refused(
    granularity: Granularity,
    scope: Scope,
    floor: int,
    message: str,
) -> None:
    units = Constraint(5, 4, 0.0, granularity, scope).units
    windowed = units * 3 // 5
    with pytest.raises(InputError) as caught:
        Constraint(5, 4, windowed / units, granularity, scope, floor)
    assert message in str(caught.value)


def test_scores_are_checked() -> None:
    constraint = Constraint(2, 4, 0.5)
    constraint.check_scores(SCORES, "scores.json")
    message = "scores.json holds scores of shape 4 x 2, but the model has 2 x 4 units"
    with pytest.raises(InputError, match=message):
        constraint.check_scores(SCORES.reshape(4, 2), "scores.json")
    for value in (float("nan"), -INFINITY):
        damaged = SCORES.clone()
        damaged[1, 2] = value
        message = f"scores.json: the score of layer 1, unit 2 is {value}, not a number"
        with pytest.raises(InputError, match=message):
            constraint.check_scores(damaged, "scores.json")
