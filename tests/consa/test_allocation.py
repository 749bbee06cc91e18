"""The allocation table: its file, its head order, and the tables made from scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.consa.allocation import FULL_WINDOW, Allocation, as_rows
from megaconsa.consa.constraint import Constraint, Granularity
from megaconsa.errors import InputError
from megaconsa.kernels.attention.head_pattern import HeadPattern

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
    assert TABLE.select(1, torch.arange(3)) == HeadPattern((64, 64, FULL_WINDOW))
    assert TABLE.full_heads_first(0) == (0, 1, 2)
    assert TABLE.full_heads_first(1) == (2, 0, 1)
    assert not TABLE.is_layer_wise
    assert replace(TABLE, full=((True,) * 3, (False,) * 3)).is_layer_wise
    assert torch.tensor(FULL_WINDOW, dtype=torch.int32) == FULL_WINDOW


@st.composite
def tables(draw: st.DrawFn) -> tuple[Allocation, int]:
    """A table and a number of ranks that divides its KV heads."""
    ranks = draw(st.integers(1, 4))
    each = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 6))
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
            # Full heads come first. Heads of one kind keep their order.
            assert list(part) == sorted(part, key=lambda head: (not row[head], head))
        counts = [sum(row[head] for head in part) for part in parts]
        assert max(counts) - min(counts) <= 1
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        # Balanced over the layers so far, and so over those of any pipeline stage too.
        assert max(totals) - min(totals) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tables())
def test_head_order_of_one_rank_is_full_heads_first(case: tuple[Allocation, int]) -> None:
    table, _ = case
    for layer, row in enumerate(table.full):
        expected = [head for head in range(len(row)) if row[head]] + [
            head for head in range(len(row)) if not row[head]
        ]
        assert table.head_order(layer, 1) == table.full_heads_first(layer) == tuple(expected)


def test_head_order_example() -> None:
    """Two ranks share three full heads and take turns in getting the second one."""
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
    contract = {
        "version",
        "num_layers",
        "num_kv_heads",
        "window",
        "granularity",
        "scope",
        "target_sparsity",
        "sparsity",
        "full",
    }
    assert written.keys() == contract | {"origin"}


def test_saving_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    TABLE.save(path)
    replace(TABLE, window=32).save(path)
    assert Allocation.load(path).window == 32


def refused(path: Path) -> str:
    """Returns the message of the refusal.

    The message must be one line and must name the file.
    """
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


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"version": 1,\n "full": [[tru', b"\xff\xfe\x00", b"not json"]
)
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_bytes(content)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"version": 2}', '{"version": "1"}'])
def test_what_is_no_allocation_of_this_version_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(content)
    assert "version 1" in refused(path)


@pytest.mark.parametrize(
    "field",
    ["window", "full", "num_layers", "num_kv_heads", "granularity", "scope", "target_sparsity"],
)
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(
        json.dumps({key: value for key, value in TABLE.to_json().items() if key != field})
    )
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
        ({"num_kv_heads": "3"}, "not a table of 2 x 3"),
        ({"window": 0}, "window is 0"),
        ({"window": -4}, "window is -4"),
        ({"window": 64.0}, "window is 64.0"),
        ({"window": "64"}, "window is '64'"),
        ({"window": True}, "window is True"),
        ({"window": None}, "window is None"),
        ({"granularity": "head"}, "granularity"),
        ({"scope": "all"}, "scope"),
        ({"target_sparsity": "half"}, "target_sparsity"),
        ({"target_sparsity": True}, "target_sparsity"),
        ({"target_sparsity": math.nan}, "target_sparsity"),
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
        expected = (
            r"a\.json was made for 2 layers x 3 KV heads, "
            rf"but the model has {shape[0]} x {shape[1]}"
        )
        with pytest.raises(InputError, match=expected):
            TABLE.check_shape(*shape, "allocation.file=a.json")


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_a_table_of_scores(granularity: Granularity) -> None:
    constraint = Constraint(4, 2, 0.5, granularity, "global")
    scores = torch.tensor([[0.0, 3.0], [2.0, 1.0], [-1.0, -2.0], [5.0, 4.0]])
    expected = ((False, True), (True, False), (False, False), (True, True))
    if granularity == "layer":
        scores = scores[:, :1]
        expected = ((False, False), (True, True), (False, False), (True, True))
    table = Allocation.from_scores(scores, constraint, 16, {"run": "runs/a"})
    assert table == Allocation(16, expected, granularity, "global", 0.5, {"run": "runs/a"})
    assert (
        Allocation.from_table(constraint.top_k(scores), constraint, 16, {"run": "runs/a"}) == table
    )


def test_as_rows() -> None:
    rows = as_rows(torch.tensor([[True, False], [False, False]]))
    assert rows == ((True, False), (False, False))
    assert all(type(value) is bool for row in rows for value in row)
