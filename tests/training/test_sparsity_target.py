"""Learning ends at the target and never passes it by much.

This runs a small model on real text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.checkpoint.gates import read_gates


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    ("granularity", "scope"), [("kv_head", "per_layer"), ("kv_head", "global"), ("layer", "global")]
)
def test_expected_sparsity_follows_the_target(
    granularity: str,
    scope: str,
    sparsity: float,
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
) -> None:
    values = make_config(
        allocation={"sparsity": sparsity, "granularity": granularity, "scope": scope},
        gates={"warmup_steps": 30},
        training={"steps": 60},
        checkpoint={"every": 0},
    )
    rows = train(values)

    per_constraint = "layer_expected_sparsity" if scope == "per_layer" else "expected_sparsity"
    for row in rows:
        expected = row[per_constraint] if scope == "per_layer" else [row[per_constraint]]
        assert max(expected) <= row["target_sparsity"] + 1e-6, f"step {row['step']}"
    assert rows[-1]["target_sparsity"] == sparsity
    end = rows[-1][per_constraint] if scope == "per_layer" else [rows[-1][per_constraint]]
    assert max(abs(value - sparsity) for value in end) <= 1e-6

    bank = read_gates(store.resolve(Path(values["run"]["dir"])))
    table = bank.constraint.top_k(bank.gates.scores)
    assert bank.constraint.sparsities(table.float()).tolist() == [sparsity] * bank.constraint.count
    assert rows[-1]["binarized_sparsity"] == sparsity
    # The gates themselves equal the table before anything binarizes them.
    assert rows[-1]["decided_share"] == 1
    assert rows[-1]["sampled_sparsity"] == pytest.approx(sparsity)
