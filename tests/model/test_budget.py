"""A budget gives the lowest sparsity that meets it. The costs are those of real tables."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from megaconsa.model.budget import QUANTITIES, Budget, Quantity
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.model.flops import attention_pairs, kv_cache_bytes

properties = settings(max_examples=200, deadline=None, derandomize=True)

MODEL = PRESETS["qwen3-0.6b"]
HEADS = Constraint(28, 8, 0.0)
ALL_HEADS = Constraint(28, 8, 0.0, "kv_head", "global")
LAYERS = Constraint(28, 8, 0.0, "layer", "global")
WITH_FLOOR = Constraint(28, 8, 0.0, "kv_head", "global", floor=2)
units = st.sampled_from([HEADS, ALL_HEADS, LAYERS, WITH_FLOOR])


def cost(
    quantity: Quantity, model_config: ModelConfig, table: Allocation, context: int
) -> Fraction:
    """Computes the cost of a finished table. Attention is counted head by head."""
    if quantity == "attention_share":
        pairs = 0
        dense = 0
        for layer in range(table.num_layers):
            for window in table.windows(layer):
                pairs += attention_pairs([context], window)
                dense += attention_pairs([context], context)
        return Fraction(pairs, dense)
    cache = kv_cache_bytes(model_config, table, context)
    if quantity == "cache_share":
        return Fraction(cache, kv_cache_bytes(model_config, None, context))
    return Fraction(cache, context)


def table_of(constraint: Constraint, window: int) -> Allocation:
    return Allocation.from_scores(torch.zeros(constraint.shape), constraint, window)


@st.composite
def limits(draw: st.DrawFn) -> tuple[Budget, int]:
    """Draws a budget and a window. Many of the budgets cannot be met."""
    quantity = draw(st.sampled_from(QUANTITIES))
    limit = draw(st.decimals("0.001", "1", places=4).map(float))
    if quantity == "cache_bytes":
        limit = draw(st.integers(1000, kv_cache_bytes(MODEL, None, 1)))
    window = draw(st.integers(1, 5000))
    context = draw(st.integers(1, 200_000))
    return Budget(quantity, limit, context), window


@properties
@given(limits(), units)
def test_the_lowest_sparsity_is_taken(case: tuple[Budget, int], constraint: Constraint) -> None:
    """It meets the budget. One windowed unit less in each constraint would not."""
    budget, window = case
    try:
        sparsity = budget.lowest_sparsity(MODEL, window, constraint)
    except InputError:
        assume(False)
    limit = Fraction(str(budget.limit))
    kept = replace(constraint, sparsity=sparsity)
    assert cost(budget.quantity, MODEL, table_of(kept, window), budget.context) <= limit
    if kept.windowed:
        less = replace(constraint, sparsity=(kept.windowed - 1) / kept.units)
        assert cost(budget.quantity, MODEL, table_of(less, window), budget.context) > limit


@properties
@given(limits(), units)
def test_only_what_nothing_keeps_is_refused(
    case: tuple[Budget, int],
    constraint: Constraint,
) -> None:
    budget, window = case
    highest = replace(constraint, sparsity=1 - constraint.floor / constraint.num_kv_heads)
    least = cost(budget.quantity, MODEL, table_of(highest, window), budget.context)
    if least <= Fraction(str(budget.limit)):
        budget.lowest_sparsity(MODEL, window, constraint)
        return
    with pytest.raises(InputError, match="is a budget below") as caught:
        budget.lowest_sparsity(MODEL, window, constraint)
    # The number that the refusal names is accepted.
    named = str(caught.value).split("below ")[1].split(",")[0]
    replace(budget, limit=float(named)).lowest_sparsity(MODEL, window, constraint)


@pytest.mark.parametrize("quantity", ["cache_bytes", "cache_share"])
def test_a_limit_that_is_met_exactly(quantity: Quantity) -> None:
    """A window of 1 caches nothing, so every cost is a short decimal."""
    for windowed in range(9):
        constraint = replace(HEADS, sparsity=windowed / 8)
        limit = float(cost(quantity, MODEL, table_of(constraint, 1), 125))
        if limit:
            assert Budget(quantity, limit, 125).lowest_sparsity(MODEL, 1, HEADS) == windowed / 8


@pytest.mark.parametrize(
    ("quantity", "limit", "constraint", "sparsity"),
    [
        # A windowed head keeps 1023 of 131,072 tokens: 0.0078 of a full head.
        ("cache_share", 0.35, ALL_HEADS, 147 / 224),
        ("cache_share", 0.35, HEADS, 0.75),
        ("cache_share", 0.35, LAYERS, 19 / 28),
        ("cache_share", 1.0, HEADS, 0.0),
        ("cache_bytes", 112 * 1024, HEADS, 0.0),
        ("cache_bytes", 57_344, HEADS, 0.625),
        # At W = 1024 a windowed head sees 0.0156 of the pairs that a full head sees.
        ("attention_share", 0.5, HEADS, 0.625),
        ("attention_share", 0.51, HEADS, 0.5),
    ],
)
def test_examples(
    quantity: Quantity,
    limit: float,
    constraint: Constraint,
    sparsity: float,
) -> None:
    budget = Budget(quantity, limit, 131_072)
    assert budget.lowest_sparsity(MODEL, 1024, constraint) == sparsity


@pytest.mark.parametrize(
    ("budget", "constraint", "message"),
    [
        (
            Budget("cache_share", 0.005, 131_072),
            HEADS,
            "allocation.cache_share=0.005 at 131072 tokens is a budget below 0.007805, what "
            "all-windowed costs with attention.window=1024; raise it, or shorten the window",
        ),
        (
            Budget("attention_share", 0.2, 131_072),
            WITH_FLOOR,
            "allocation.attention_share=0.2 at 131072 tokens is a budget below 0.261673, the least "
            "that attention.window=1024 and allocation.floor=2 cost; raise it, shorten the window "
            "or lower the floor",
        ),
        (
            Budget("cache_bytes", 120_000, 131_072),
            HEADS,
            "allocation.cache_bytes=120000 at 131072 tokens is above 114688, the cost of the dense "
            "model; lower it, or leave it out and give allocation.sparsity=0",
        ),
        (Budget("cache_share", 1.01, 131_072), LAYERS, "is above 1, the cost of the dense model"),
        # A window longer than the context saves nothing.
        (Budget("attention_share", 0.99, 1024), HEADS, "is a budget below 1, what all-windowed"),
    ],
)
def test_refusals_name_the_numbers_and_the_fix(
    budget: Budget,
    constraint: Constraint,
    message: str,
) -> None:
    with pytest.raises(InputError) as caught:
        budget.lowest_sparsity(MODEL, 1024, constraint)
    assert message in str(caught.value)
