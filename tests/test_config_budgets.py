"""Budgets of cache and attention in the run configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megaconsa.config import build, load
from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from tests.support.config_cases import PER_LAYER, changed, refusal


@pytest.mark.parametrize("quantity", ["cache_bytes", "cache_share", "attention_share"])
def test_a_budget_becomes_the_lowest_sparsity_that_keeps_it(quantity: str) -> None:
    """The model is tiny, with a window of 1.

    At 31 tokens, a windowed head caches nothing and sees a sixteenth of the pairs.
    """
    limits = {"cache_bytes": 4 * 4 * 128 // 2, "cache_share": 0.5, "attention_share": 0.53125}
    limit = limits[quantity]
    config = build(
        changed(attention__window=1, allocation=PER_LAYER | {quantity: limit, "context": 31})
    )
    assert config.allocation.sparsity == 0.5
    assert config.constraint() == Constraint(4, 4, 0.5)
    just_below = limit - 1 if quantity == "cache_bytes" else limit - 0.001
    less = build(
        changed(attention__window=1, allocation=PER_LAYER | {quantity: just_below, "context": 31})
    )
    assert less.allocation.sparsity == 0.75


def test_a_budget_on_a_model_that_the_default_sparsity_does_not_fit() -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3}
    config = build(changed(model=shape, allocation=PER_LAYER | {"cache_share": 0.5, "context": 64}))
    assert config.constraint().windowed == 2


def test_a_resolved_budget_loads_again_and_is_held_to() -> None:
    config = build(changed(allocation=PER_LAYER | {"cache_share": 0.5, "context": 64}))
    written = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert (written["allocation"]["sparsity"], written["allocation"]["cache_share"]) == (0.75, 0.5)
    assert build(written) == config
    assert build(written).to_dict() == config.to_dict()
    written["attention"]["window"] = 1
    expected = (
        "allocation.sparsity=0.75 is given, but allocation.cache_share=0.5 at 64 tokens "
        "makes it 0.5"
    )
    assert expected in refusal(written)


def test_an_override_replaces_a_sparsity_by_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(allocation__sparsity=0.25)))
    budget = ["allocation.cache_share=0.5", "allocation.context=64"]
    with pytest.raises(InputError, match=r"for example by allocation\.sparsity=null"):
        load(path, budget)
    assert load(path, [*budget, "allocation.sparsity=null"]).allocation.sparsity == 0.75
    assert load(path, ["allocation.sparsity=null"]).allocation.sparsity == 0.5


def test_a_sparsity_rounded_by_hand_agrees_with_its_budget() -> None:
    """The configuration keeps the exact sparsity."""
    allocation = {
        "source": "learn",
        "granularity": "layer",
        "scope": "global",
        "cache_share": 0.5,
        "context": 64,
    }
    fields = {"model__num_hidden_layers": 7, "allocation": {**allocation, "sparsity": 0.5714286}}
    assert build(changed(**fields)).allocation.sparsity == 4 / 7


@pytest.mark.parametrize(
    ("rule", "sparsity"),
    [("head-share", 0.75), ("bottom-swa", 0.75), ("middle", 0.75), ("random", 0.5625)],
)
def test_budgets_of_rules_count_their_own_units(rule: str, sparsity: float) -> None:
    """Half of the cache at 64 tokens allows windows in part of the units.

    These are 9 of 16 heads, or 3 of 4 heads in each layer, or 3 of 4 layers.
    """
    allocation = {
        "source": "rule",
        "rule": rule,
        "scope": "global",
        "cache_share": 0.5,
        "context": 64,
    }
    config = build(
        changed(model={"num_hidden_layers": 4, "num_key_value_heads": 4}, allocation=allocation)
    )
    table = config.fixed_allocation()
    assert table is not None
    assert table.sparsity == table.target_sparsity == config.allocation.sparsity == sparsity
