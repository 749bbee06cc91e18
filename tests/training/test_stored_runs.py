"""This version resumes runs of earlier versions.

tests/support/stored_runs.py makes the archives, one per release.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa import config as configuration
from megaconsa.checkpoint import store
from megaconsa.checkpoint.writer import file_entry, write_json
from megaconsa.config import BadStepsSection, build, with_defaults
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training import inputs as inputs_module
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from tests.support.stored_runs import FOLDER, STOPPED_AFTER

ARCHIVES = sorted(FOLDER.glob("*.tar.gz"))


def extracted(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    return extracted(ARCHIVES[-1], tmp_path)


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes state.json of the run's checkpoint, and the configuration that goes with it.

    They become what another version would have written.
    """
    checkpoint = store.committed(run)[0]
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    write_json(checkpoint / "state.json", state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= file_entry(checkpoint / "state.json")
    write_json(checkpoint / "manifest.json", manifest)


def test_this_version_has_its_archive() -> None:
    assert ARCHIVES


@pytest.mark.parametrize("kind", ["learn", "train"])
@pytest.mark.parametrize(
    "archive", ARCHIVES, ids=[archive.name.removesuffix(".tar.gz") for archive in ARCHIVES]
)
def test_a_run_of_each_version_goes_on(archive: Path, kind: str, tmp_path: Path) -> None:
    folder = extracted(archive, tmp_path)
    trainer = build_trainer(
        check_inputs(configuration.load(folder / kind / "config.yaml")), mesh.initialize()
    )
    assert trainer.progress.step == STOPPED_AFTER
    assert trainer.run()
    losses = [row["loss"] for row in read_metrics(folder / kind / "metrics.jsonl")]
    assert losses == pytest.approx(
        json.loads((folder / "expected.json").read_text())[kind], rel=1e-5
    )


def test_a_field_that_a_version_did_not_have_is_its_default() -> None:
    """Removes, one at a time, each field that a later version could have added.

    Also removes each such section.
    """
    required = {
        "run": {"dir": "run"},
        "attention": {"window": 8},
        "allocation": {"source": "learn"},
        "training": {
            "steps": 400,
            "micro_batch": 1,
            "global_batch": 1,
            "sequence_length": 64,
            "learning_rate": 1e-3,
        },
        "data": {"path": "data"},
    }
    full = build(required).to_dict()
    removed = 0
    for section, fields in full.items():
        if section not in required:
            without = {name: values for name, values in full.items() if name != section}
            assert with_defaults(without) == full, section
        for field in fields.keys() - required.get(section, {}).keys():
            rest = {name: value for name, value in fields.items() if name != field}
            assert with_defaults(full | {section: rest}) == full, f"{section}.{field}"
            removed += 1
    assert removed > 40


@pytest.mark.parametrize("kind", ["learn", "train"])
def test_a_checkpoint_with_fewer_fields(kind: str, newest: Path) -> None:
    def older(state: dict[str, Any]) -> None:
        del state["config"]["watchdog"]
        del state["config"]["bad_steps"]["deviations"]
        del state["config"]["allocation"]["floor"]
        del state["config"]["training"]["betas"]
        del state["shape"]["rms_norm_eps"]

    run = newest / kind
    rewrite(run, older)
    assert check_inputs(configuration.load(run / "config.yaml")).resume is not None


def test_an_absent_field_is_no_other_value(newest: Path) -> None:
    run = newest / "train"
    rewrite(run, lambda state: state["config"]["training"].pop("weight_decay"))
    with pytest.raises(InputError, match=r"training.weight_decay: 0.1 -> 0.2\)"):
        check_inputs(configuration.load(run / "config.yaml", ["training.weight_decay=0.2"]))


def test_the_default_of_a_new_field_of_the_data(
    monkeypatch: pytest.MonkeyPatch, newest: Path
) -> None:
    class Later(DatasetInfo):
        alphabet: str = "any"

    monkeypatch.setattr(inputs_module, "DatasetInfo", Later)
    assert check_inputs(configuration.load(newest / "train" / "config.yaml")).resume is not None


def test_defaults_are_plain_values() -> None:
    assert with_defaults({}, BadStepsSection) == BadStepsSection().model_dump(mode="json")
    assert (
        ModelConfig(8, 8, 8, 1, 1, 1).rms_norm_eps == inputs_module._DEFAULT_SHAPE["rms_norm_eps"]
    )
