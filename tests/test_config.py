"""The run configuration: the shipped files, defaults, seeds, and differences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.config import build, differences, load
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.model.config import PRESETS, ModelConfig
from tests.support.config_cases import BASE, changed

STUDIES = {"study.yaml", "study_cpu.yaml"}
"""These files name a run configuration, but they are not one."""
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if path.name not in STUDIES
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load(path)
    assert build(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_there_are_configurations() -> None:
    assert CONFIGS


def test_the_smallest_configuration() -> None:
    config = build(changed(allocation={"source": "learn"}))
    assert config.learning
    assert config.to_model_config() == PRESETS["tiny"]
    assert (config.allocation.sparsity, config.allocation.granularity, config.allocation.scope) == (
        0.5,
        "kv_head",
        "global",
    )
    assert not build(changed(allocation={"source": "rule"})).learning


def test_shape_fields_override_the_preset() -> None:
    fields = {
        "vocab_size": 99,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "rope_theta": 5e3,
        "num_hidden_layers": 3,
    }
    shape = build(changed(model={"preset": "small", **fields})).to_model_config()
    assert shape == ModelConfig(
        99, 512, 1408, 3, 16, 8, 6, False, 5e3, max_position_embeddings=32_768
    )


def test_constraint_of_learning_and_of_rules() -> None:
    section = {"source": "learn", "scope": "global", "sparsity": 0.5, "floor": 1}
    assert build(changed(allocation=section)).constraint() == Constraint(
        4, 4, 0.5, "kv_head", "global", 1
    )
    rule = {**section, "source": "rule"}
    assert build(changed(allocation={**rule, "rule": "middle"})).constraint() == Constraint(
        4, 4, 0.5, "layer", "global"
    )
    assert build(changed(allocation={**rule, "rule": "head-share"})).constraint() == Constraint(
        4, 4, 0.5
    )
    random = build(changed(allocation={**rule, "rule": "random"}))
    assert random.constraint() == Constraint(4, 4, 0.5, "kv_head", "global", 1)


def test_seeds_of_rules() -> None:
    def table(**fields: Any) -> Allocation:
        seed = fields.pop("run__seed", 0)
        allocation = build(
            changed(run__seed=seed, allocation={"source": "rule", **fields})
        ).fixed_allocation()
        assert allocation is not None
        return allocation

    assert table(rule="random", run__seed=5).origin == {"rule": "random", "seed": 5}
    assert table(rule="random", run__seed=5, seed=0).origin == {"rule": "random", "seed": 0}
    assert table(rule="head-share", run__seed=5).origin == {"rule": "head-share"}
    assert table(rule="head-share", run__seed=5, seed=1).origin == {"rule": "head-share", "seed": 1}


def test_sections_are_frozen() -> None:
    config = build(BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3


def test_differences_name_each_field_once() -> None:
    old = build(BASE).to_dict()
    new = build(changed(training__steps=20, model__vocab_size=99, run__dir="runs/b")).to_dict()
    assert differences(old, new) == [
        "model.vocab_size: None -> 99",
        "run.dir: runs/a -> runs/b",
        "training.steps: 10 -> 20",
    ]
    assert differences(old, copy.deepcopy(old)) == []


def test_differences_see_fields_that_one_side_lacks() -> None:
    assert differences({"a": {"b": 1}}, {"a": {}, "c": 2}) == ["a.b: 1 -> None", "c: None -> 2"]
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1} -> 3"]
