"""model.init_from gives a configuration the shape, rope and context of the weights it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.config import build, load
from megaconsa.errors import InputError
from megaconsa.model.config import PRESETS, ModelConfig

PUBLISHED = replace(
    PRESETS["tiny"],
    hidden_size=96,
    num_hidden_layers=6,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=2048,
)

Values = dict[str, Any]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """An import, as far as its shape is concerned."""
    folder = tmp_path / "import"
    write_state(folder, PUBLISHED)
    return folder


@pytest.fixture
def values(tmp_path: Path, origin: Path) -> Callable[..., Values]:
    """Plain values of a run that starts from the import, with further fields of `model`."""

    def make(**model: Any) -> Values:
        return {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"init_from": str(origin)} | model,
            "attention": {"window": 8},
            "allocation": {"source": "rule", "rule": "dense"},
            "training": {
                "steps": 2,
                "micro_batch": 1,
                "global_batch": 1,
                "sequence_length": 64,
                "learning_rate": 1e-3,
            },
            "data": {"path": "data"},
        }

    return make


def write_state(folder: Path, shape: ModelConfig) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"shape": asdict(shape)}))


def write_run(run: Path, values: Values) -> None:
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def test_nothing_needs_to_be_retyped(values: Callable[..., Values], tmp_path: Path) -> None:
    """Overrides may name the import too, and the configuration that a run writes loads again."""
    assert build(values()).to_model_config() == PUBLISHED
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values() | {"model": {}}))
    config = load(file, [f"model.init_from={tmp_path / 'import'}"])
    assert config.to_model_config() == PUBLISHED
    assert build(config.to_dict()) == config


def test_the_context_may_be_extended(values: Callable[..., Values]) -> None:
    longer = {"rope_theta": 5e6, "max_position_embeddings": 8192}
    assert build(values(**longer)).to_model_config() == replace(PUBLISHED, **longer)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"hidden_size": 128},
            "model.hidden_size=128 contradicts model.init_from={origin}, "
            "whose weights have hidden_size=96; leave model.hidden_size out",
        ),
        (
            {"rms_norm_eps": 1e-6},
            "model.rms_norm_eps=1e-06 contradicts model.init_from={origin}, "
            "whose weights have rms_norm_eps=1e-05; leave model.rms_norm_eps out",
        ),
        (
            {"preset": "tiny"},
            "model.preset=tiny with hidden_size=128 contradicts model.init_from={origin}, "
            "whose weights have hidden_size=96; "
            "leave the preset out, for example by model.preset=null",
        ),
    ],
)
def test_a_contradiction_is_refused(
    model: Values, said: str, values: Callable[..., Values], origin: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        build(values(**model))
    assert str(refusal.value) == said.format(origin=origin)


def test_a_preset_of_the_same_shape_is_none(values: Callable[..., Values], origin: Path) -> None:
    """Published models differ from the preset in context, rope and epsilon."""
    shape = replace(PRESETS["tiny"], rope_theta=5e5, rms_norm_eps=1e-5, initializer_range=0.01)
    write_state(origin, shape)
    assert build(values(preset="tiny")).to_model_config() == shape
    write_state(origin, PUBLISHED)
    assert build(values(preset=None)).to_model_config() == PUBLISHED


def test_stage_2_takes_the_shape_of_stage_1(values: Callable[..., Values], tmp_path: Path) -> None:
    write_run(tmp_path / "learn", build(values()).to_dict())
    stage_2 = values(init_from=str(tmp_path / "learn"))
    assert build(stage_2).to_model_config() == PUBLISHED
    # A run of an earlier version recorded null for what its preset says.
    write_run(
        tmp_path / "old", {"model": {"preset": "small", "hidden_size": 64, "vocab_size": None}}
    )
    old = build(values(init_from=str(tmp_path / "old"))).to_model_config()
    assert old == replace(PRESETS["small"], hidden_size=64)


def test_a_run_that_has_begun_does_not_need_its_import(
    values: Callable[..., Values], origin: Path, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", build(values()).to_dict())
    (origin / "state.json").unlink()
    assert build(values()).to_model_config() == PUBLISHED


@pytest.mark.parametrize("text", ["", "[]", '{"shape": 3}', '{"shape": {"hidden_size": "wide"}}'])
def test_what_cannot_be_read_is_left_to_the_check_of_checkpoints(
    text: str, values: Callable[..., Values], origin: Path
) -> None:
    (origin / "state.json").write_text(text)
    assert build(values()).to_model_config() == PRESETS["tiny"]
