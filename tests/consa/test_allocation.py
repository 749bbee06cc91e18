"""The allocation table: its file, and binarising that meets every constraint exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.consa.allocation import (
    FULL_WINDOW,
    Allocation,
    Granularity,
    Scope,
    as_rows,
    check_sparsity,
    cut_margin,
    threshold,
    top_k,
)
from megaconsa.errors import InputError

TABLE = Allocation(
    64,
    ((True, False, False), (False, False, True)),
    "kv_head",
    "global",
    2 / 3,
    {"run": "runs/a", "step": 7, "cut_margin": None},
)


def test_properties() -> None:
    assert (TABLE.num_layers, TABLE.num_kv_heads, TABLE.sparsity) == (2, 3, pytest.approx(2 / 3))
    assert TABLE.windows(1) == (64, 64, FULL_WINDOW)
    assert TABLE.select(1, torch.arange(3)) == ((64, 64, FULL_WINDOW), None)
    assert TABLE.full_heads_first(0) == (0, 1, 2)
    assert TABLE.full_heads_first(1) == (2, 0, 1)
    assert not TABLE.is_layer_wise
    assert replace(TABLE, full=((True,) * 3, (False,) * 3)).is_layer_wise
    assert torch.tensor(FULL_WINDOW, dtype=torch.int32) == FULL_WINDOW


@st.composite
def tables(draw: st.DrawFn) -> tuple[Allocation, int]:
    """A table and a number of ranks that can share its KV heads."""
    ranks, each, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.lists(st.booleans(), min_size=ranks * each, max_size=ranks * each)
    return Allocation(64, as_rows(draw(st.lists(row, min_size=layers, max_size=layers)))), ranks


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tables())
def test_head_order_deals_full_heads_evenly(case: tuple[Allocation, int]) -> None:
    table, ranks = case
    each = table.num_kv_heads // ranks
    totals = [0] * ranks
    for layer, row in enumerate(table.full):
        order = table.head_order(layer, ranks)
        assert sorted(order) == list(range(table.num_kv_heads))
        parts = [order[rank * each : (rank + 1) * each] for rank in range(ranks)]
        for part in parts:
            assert list(part) == sorted(part, key=lambda head: (not row[head], head))  # full heads first, otherwise in order
        counts = [sum(row[head] for head in part) for part in parts]
        assert max(counts) - min(counts) <= 1
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        # Level over the layers so far, and so over those of any pipeline stage too.
        assert max(totals) - min(totals) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tables())
def test_head_order_of_one_rank_is_full_heads_first(case: tuple[Allocation, int]) -> None:
    table, _ = case
    for layer, row in enumerate(table.full):
        expected = [head for head in range(len(row)) if row[head]] + [head for head in range(len(row)) if not row[head]]
        assert table.head_order(layer, 1) == table.full_heads_first(layer) == tuple(expected)


def test_head_order_example() -> None:
    """Three full heads on two ranks: one more to each in turn."""
    table = Allocation(64, ((True, True, True, False),) * 2)
    assert [table.head_order(layer, 2) for layer in range(2)] == [(0, 1, 2, 3), (0, 3, 1, 2)]
    with pytest.raises(ValueError, match="4 KV heads do not divide into 3 equal parts"):
        table.head_order(0, 3)


def test_file_round_trip_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "allocation.json"
    TABLE.save(path)
    assert Allocation.load(path) == TABLE
    assert [each.name for each in path.parent.iterdir()] == ["allocation.json"]
    written = json.loads(path.read_text())
    assert written["full"] == [[True, False, False], [False, False, True]]
    assert written["sparsity"] == pytest.approx(2 / 3)
    contract = {"version", "num_layers", "num_kv_heads", "window", "granularity", "scope", "target_sparsity", "sparsity", "full"}
    assert written.keys() == contract | {"origin"}


def test_saving_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    TABLE.save(path)
    replace(TABLE, window=32).save(path)
    assert Allocation.load(path).window == 32


def refused(path: Path) -> str:
    """The message of the refusal: one line, and it names the file."""
    with pytest.raises(InputError) as caught:
        Allocation.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "allocation.json")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1,\n "full": [[tru', b"\xff\xfe\x00", b"not json"])
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_bytes(content)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"version": 2}', '{"version": "1"}'])
def test_what_is_no_allocation_of_this_version_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(content)
    assert "version 1" in refused(path)


@pytest.mark.parametrize("field", ["window", "full", "num_layers", "num_kv_heads", "granularity", "scope", "target_sparsity"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({key: value for key, value in TABLE.to_json().items() if key != field}))
    assert f"lacks {field}" in refused(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"full": [[True, False, False], [False, False]]}, "not a table of 2 x 3"),
        ({"full": [[True, False, False]]}, "not a table of 2 x 3"),
        ({"full": [[True, False, False], [False, False, 1]]}, "not a table of 2 x 3"),
        ({"full": [[True, False, False], [False, False, None]]}, "not a table of 2 x 3"),
        ({"full": [[True, False, False], "FF."]}, "not a table of 2 x 3"),
        ({"full": {"0": [True]}}, "not a table of 2 x 3"),
        ({"full": None}, "not a table of 2 x 3"),
        ({"full": [], "num_layers": 0}, "not a table of 0 x 3"),
        ({"full": [[], []], "num_kv_heads": 0}, "not a table of 2 x 0"),
        ({"num_layers": 3}, "not a table of 3 x 3"),
        ({"num_layers": None}, "not a table of None x 3"),
        ({"window": 0}, "window is 0"),
        ({"window": -4}, "window is -4"),
        ({"window": 64.0}, "window is 64.0"),
        ({"window": "64"}, "window is '64'"),
        ({"window": True}, "window is True"),
        ({"window": None}, "window is None"),
        ({"granularity": "head"}, "granularity"),
        ({"scope": "all"}, "scope"),
        ({"target_sparsity": "half"}, "target_sparsity"),
        ({"target_sparsity": None}, "target_sparsity"),
        ({"origin": ["runs/a"]}, "origin"),
    ],
)
def test_damaged_fields_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(TABLE.to_json() | changed))
    assert message in refused(path)


def test_a_table_of_another_shape_is_refused() -> None:
    TABLE.check_shape(2, 3, "allocation.file=a.json")
    for shape in ((3, 3), (2, 4), (3, 2)):
        expected = rf"a\.json was made for 2 layers x 3 KV heads, but the model has {shape[0]} x {shape[1]}"
        with pytest.raises(InputError, match=expected):
            TABLE.check_shape(*shape, "allocation.file=a.json")


@st.composite
def binarizations(draw: st.DrawFn) -> tuple[list[list[float]], int, int, Granularity, Scope]:
    """(values by constraint, KV heads, windowed units of a constraint, granularity, scope); values from a few, so that many tie."""
    granularity, scope = draw(st.sampled_from([("kv_head", "per_layer"), ("kv_head", "global"), ("layer", "global")]))
    layers, heads = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    units = heads if granularity == "kv_head" else 1
    few = st.sampled_from([-1.5, -1e-30, 0.0, 1e-30, 2.5])
    values = draw(st.lists(st.lists(few, min_size=units, max_size=units), min_size=layers, max_size=layers))
    span = units if scope == "per_layer" else layers * units
    return values, heads, draw(st.integers(0, span)), granularity, scope


@settings(max_examples=200, deadline=None, derandomize=True)
@given(binarizations())
def test_top_k_meets_every_constraint_exactly_and_keeps_the_largest(
    case: tuple[list[list[float]], int, int, Granularity, Scope],
) -> None:
    """Against a plain sort; among equal values the lower index stays full."""
    values, heads, windowed, granularity, scope = case
    constraints = values if scope == "per_layer" else [[value for row in values for value in row]]
    span = len(constraints[0])
    expected = []
    for constraint in constraints:
        kept = sorted(range(span), key=lambda unit: (-constraint[unit], unit))[: span - windowed]
        expected += [unit in kept for unit in range(span)]
    log_alpha = torch.tensor(values, requires_grad=True)
    log_alpha = log_alpha[:, 0] if granularity == "layer" else log_alpha
    full = top_k(log_alpha, windowed / span, heads, granularity, scope)
    assert full.shape == (len(values), heads)
    units = full[:, :1] if granularity == "layer" else full
    assert units.flatten().tolist() == expected
    assert bool((full == full[:, :1]).all()) or granularity == "kv_head"
    assert 1 - float(full.double().mean()) == pytest.approx(windowed / span)


@pytest.mark.parametrize(
    ("granularity", "scope", "span"), [("kv_head", "per_layer", 8), ("kv_head", "global", 224), ("layer", "global", 28)]
)
def test_every_expressible_sparsity_of_the_papers_model_is_accepted(granularity: Granularity, scope: Scope, span: int) -> None:
    for windowed in range(span + 1):
        assert check_sparsity(windowed / span, 28, 8, granularity, scope) == windowed
        assert check_sparsity(float(f"{windowed / span:.7f}"), 28, 8, granularity, scope) == windowed


def test_threshold_is_the_papers_rule() -> None:
    log_alpha = torch.tensor([[0.0, 1e-30, -1e-30], [3.0, -3.0, 0.5]], requires_grad=True)
    assert threshold(log_alpha, 3).tolist() == [[False, True, False], [True, False, True]]
    assert threshold(log_alpha[:, 1], 2).tolist() == [[True, True], [False, False]]


def test_cut_margin_is_the_gap_at_the_cut() -> None:
    log_alpha = torch.tensor([[4.0, 1.0, 3.0, 0.0], [8.0, 2.0, 2.5, -9.0]], dtype=torch.float64)
    assert cut_margin(log_alpha, 0.5, 4, "kv_head", "per_layer") == 0.5
    assert cut_margin(log_alpha, 0.25, 4, "kv_head", "per_layer") == 1.0
    assert cut_margin(log_alpha, 0.5, 4, "kv_head", "global") == 0.5
    assert cut_margin(log_alpha, 0.25, 4, "kv_head", "global") == 1.0
    assert cut_margin(log_alpha[:, 0], 0.5, 4, "layer", "global") == 4.0
    for nothing_cut in (0.0, 1.0):
        assert cut_margin(log_alpha, nothing_cut, 4, "kv_head", "per_layer") == float("inf")


@pytest.mark.parametrize(
    ("sparsity", "granularity", "scope", "message"),
    [
        (0.3, "kv_head", "per_layer", "=0.3 cannot be met by the 4 KV heads of a layer; possible are 0, 0.25, 0.5, 0.75, 1"),
        (0.5, "layer", "global", "cannot be met by 5 layers; possible are 0, 0.2, 0.4, 0.6, 0.8, 1"),
        (
            0.51,
            "kv_head",
            "global",
            "cannot be met by 20 KV heads; multiples of 1/20 are possible, near it 0.4, 0.45, 0.5, 0.55, 0.6",
        ),
        (0.99, "kv_head", "global", "near it 0.9, 0.95, 1"),
        (0.5001, "kv_head", "per_layer", "possible are"),
        (-0.25, "kv_head", "per_layer", "allocation.sparsity=-0.25 must lie between 0 and 1"),
        (1.25, "kv_head", "per_layer", "must lie between 0 and 1"),
        (float("nan"), "kv_head", "per_layer", "allocation.sparsity=nan must lie between 0 and 1"),
        (float("inf"), "kv_head", "global", "must lie between 0 and 1"),
        (0.4, "layer", "per_layer", "allocation.scope=per_layer cannot hold with allocation.granularity=layer"),
    ],
)
def test_sparsity_that_cannot_be_met_is_refused(sparsity: float, granularity: Granularity, scope: Scope, message: str) -> None:
    """Five layers of four KV heads."""
    with pytest.raises(InputError) as caught:
        check_sparsity(sparsity, 5, 4, granularity, scope)
    assert message in str(caught.value)
    log_alpha = torch.zeros(5) if granularity == "layer" else torch.zeros(5, 4)
    for function in (top_k, cut_margin):
        with pytest.raises(InputError):
            function(log_alpha, sparsity, 4, granularity, scope)


def test_as_rows() -> None:
    rows = as_rows(torch.tensor([[True, False], [False, False]]))
    assert rows == ((True, False), (False, False))
    assert all(type(value) is bool for row in rows for value in row)
