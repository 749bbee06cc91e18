"""The pipeline's cut by cost, compared with brute force.

The costs of the layers are compared with the FLOPs of the whole model.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.rules import bottom_swa, dense, head_share
from megaconsa.errors import InputError
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.model.flops import training_flops
from megaconsa.parallel.stages import cut, layer_costs

SMALL = ModelConfig(50, 16, 24, 3, 4, 2, head_dim=8)


@pytest.mark.parametrize(
    "allocation",
    [None, dense(28, 8, 1024), head_share(28, 8, 1024, 0.5), bottom_swa(28, 8, 512, 0.25)],
    ids=str,
)
def test_costs_are_a_third_of_the_training_flops(allocation: Allocation | None) -> None:
    model = PRESETS["qwen3-0.6b"]
    costs = layer_costs(model, allocation, 8192)
    assert len(costs) == model.num_hidden_layers + 3
    assert 3 * sum(costs) == training_flops(model, allocation, 8192, [8192])


def test_costs_layer_by_layer() -> None:
    """With 4 tokens, a full head has 10 pairs and a head with window 2 has 7.

    2 query heads of 8 dimensions share a KV head.
    """
    costs = layer_costs(SMALL, Allocation(2, ((True, True), (False, False), (True, False))), 4)
    linear = 2 * 4 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24)
    pair = 2 * 2 * 2 * 8
    assert costs == [
        0,
        linear + 20 * pair,
        linear + 14 * pair,
        linear + 17 * pair,
        0,
        2 * 4 * 50 * 16,
    ]
    assert layer_costs(SMALL, None, 4)[1:4] == [linear + 20 * pair] * 3


def parts(costs: list[int], bounds: list[int]) -> list[int]:
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draws costs for the layers of the pipeline, and a number of stages.

    The costs are small, so that many cuts are equally good.
    """
    blocks = draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))
    embedding = draw(st.integers(0, 3))
    norm = draw(st.integers(0, 3))
    head = draw(st.integers(0, 15))
    stages = draw(st.integers(1, len(blocks) + 1))
    return [embedding, *blocks, norm, head], stages


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cuts())
def test_cut_is_the_best_of_all(case: tuple[list[int], int]) -> None:
    costs, stages = case
    bounds = cut(costs, stages)
    # A bound cannot separate the embedding from the first block, or the norm from the head.
    possible = [
        [0, *inner, len(costs)] for inner in combinations(range(2, len(costs) - 1), stages - 1)
    ]
    assert bounds == min(
        possible, key=lambda each: (sorted(parts(costs, each), reverse=True), each)
    )
    assert max(parts(costs, bounds)) == min(max(parts(costs, each)) for each in possible)


def test_equal_blocks_are_shared_equally() -> None:
    assert cut([0, 4, 4, 4, 4, 4, 4, 0, 8], 2) == [0, 5, 9]
    assert cut([0, 4, 4, 4, 4, 4, 4, 0, 8], 4) == [0, 3, 5, 7, 9]
    # Later stages get the remaining layers. In the second case the head alone sets the pace, and
    # the other stages are still balanced.
    assert cut([0, 4, 4, 4, 0, 0], 2) == [0, 2, 6]
    assert cut([0, 1, 1, 1, 1, 1, 1, 0, 100], 4) == [0, 3, 5, 7, 9]


def test_more_windows_move_the_cut() -> None:
    """If the lower half is windowed, the first stage takes more layers."""
    model = PRESETS["qwen3-0.6b"]
    full = cut(layer_costs(model, None, 32_768), 2)[1]
    assert cut(layer_costs(model, bottom_swa(28, 8, 1024, 0.5), 32_768), 2)[1] > full


@pytest.mark.parametrize("stages", [5, 8])
def test_too_many_stages_are_refused(stages: int) -> None:
    with pytest.raises(
        InputError,
        match=f"{stages} pipeline stages are more than 3 layers and the output head can fill",
    ):
        cut(layer_costs(SMALL, None, 4), stages)
    assert cut(layer_costs(SMALL, None, 4), 4) == [0, 2, 3, 4, 6]
