"""training.memory_gib: how many layers are recomputed, and that nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.errors import InputError
from megaconsa.planning.plan import make_plan
from megaconsa.training.inputs import check_inputs

MakeConfig = Callable[..., dict[str, Any]]
LAYERS = 4


def settings(make_config: MakeConfig, **training: Any) -> dict[str, Any]:
    return make_config(model={"num_hidden_layers": LAYERS}, training=training)


def estimates(values: dict[str, Any]) -> tuple[float, float]:
    """The estimates in GiB with no layer recomputed, and with all of them."""
    kept = make_plan(build(values), 1, "h100", 0.4).memory
    recomputed = kept.total - kept.activations + kept.activations_checkpointed
    return kept.total / 2**30, recomputed / 2**30


def test_as_few_layers_as_possible_are_recomputed(make_config: MakeConfig) -> None:
    highest, lowest = estimates(settings(make_config))
    numbers = []
    for share in (1.0, 0.99, 0.6, 0.3):
        budget = lowest + share * (highest - lowest)
        values = settings(make_config, memory_gib=budget)
        recomputed = check_inputs(build(values)).recomputed
        assert recomputed == frozenset(range(len(recomputed)))
        assert make_plan(build(values), 1, "h100", 0.4).memory.total <= budget * 2**30
        numbers.append(len(recomputed))
    assert numbers[:2] == [0, 1]
    assert numbers == sorted(numbers)
    assert numbers[-1] < LAYERS


def test_a_budget_that_cannot_be_kept_is_refused(make_config: MakeConfig) -> None:
    _, lowest = estimates(settings(make_config))
    with pytest.raises(InputError, match="is too little: pipeline rank 0 takes"):
        check_inputs(build(settings(make_config, memory_gib=0.9 * lowest)))


def test_a_budget_and_recomputing_all_are_two_ways(make_config: MakeConfig) -> None:
    values = settings(make_config, memory_gib=70, activation_checkpointing=True)
    with pytest.raises(InputError, match="leave one of them out"):
        build(values)


def test_some_recomputed_layers_change_nothing(
    make_config: MakeConfig,
    train: Callable[..., Any],
    tmp_path: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = settings(make_config)
    highest, lowest = estimates(values)
    whole = train(values)
    values = settings(make_config, memory_gib=(highest + lowest) / 2)
    values["run"]["dir"] = str(tmp_path / "recomputed")
    with caplog.at_level(logging.INFO, logger="megaconsa"):
        partly = train(values)
    assert "recomputes 2 of 4 layers to keep training.memory_gib" in caplog.text
    assert [row["loss"] for row in partly] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in partly] == [row["grad_norm"] for row in whole]
