"""A run may be moved, and its paths may be spelled differently. Only what they hold counts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa import config as configuration
from megaconsa.checkpoint import store
from megaconsa.config import Config, build
from megaconsa.consa.rules import head_share
from megaconsa.errors import InputError
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import computed, read_metrics
from megaconsa.run_paths import PATHS
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from tests.support.interruptions import StopAfter, interrupted

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def project(make_config: MakeConfig, train: Any, small_data: Path, tmp_path: Path) -> Path:
    """A folder with data, a run of stage 1, its table, and a stopped run of stage 2."""
    folder = tmp_path / "project"
    shutil.copytree(small_data, folder / "data")
    train(make_config(run={"dir": str(folder / "learn")}, data={"path": str(folder / "data")}))
    head_share(4, 4, 8, 0.5).save(folder / "table.json")
    interrupted(stage_2(make_config, folder), StopAfter(3))
    return folder


def stage_2(make_config: MakeConfig, folder: Path, name: str = "train") -> dict[str, Any]:
    return make_config(
        run={"dir": str(folder / name)},
        model={"init_from": str(folder / "learn")},
        allocation={"source": "file", "file": str(folder / "table.json")},
        data={"path": str(folder / "data")},
    )


def whole(make_config: MakeConfig, train: Any, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = train(stage_2(make_config, folder, "whole"))
    return rows


def test_every_path_of_a_configuration_is_known() -> None:
    fields = [
        (name, field)
        for name, section in Config.model_fields.items()
        for field, info in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if "Path" in str(info.annotation)
    ]
    assert sorted(fields) == sorted(PATHS)


def test_moved_with_all_it_names(
    project: Path,
    make_config: MakeConfig,
    train: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run's own config.yaml is enough, and readers of a checkpoint find the data."""
    expected = whole(make_config, train, project)
    there = tmp_path / "else" / "where"
    there.parent.mkdir()
    project.rename(there)
    config = configuration.load(there / "train" / "config.yaml")
    assert "was moved here from" in caplog.text
    assert config.run.dir == there / "train"
    assert config.data.path == there / "data"
    assert build_trainer(check_inputs(config), mesh.initialize()).run()
    assert computed(read_metrics(there / "train" / "metrics.jsonl")) == computed(expected)
    assert not project.exists()
    tokenizer = store.resolve(there / "learn").tokenizer
    assert tokenizer is not None
    assert tokenizer.is_dir()


def test_a_copy_does_not_take_the_runs_place(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "train", tmp_path / "copy")
    assert configuration.load(tmp_path / "copy" / "config.yaml").run.dir == project / "train"


def test_spelled_otherwise_and_from_elsewhere(
    project: Path,
    make_config: MakeConfig,
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole(make_config, train, project)
    (tmp_path / "link").symlink_to(project)
    values = stage_2(make_config, tmp_path / "link")
    monkeypatch.chdir(project)
    values["run"]["dir"] = "train"
    values["allocation"]["file"] = "../project/table.json"
    assert computed(train(values)) == computed(expected)


def test_relative_paths_are_those_of_the_place_where_they_were_written(
    project: Path,
    make_config: MakeConfig,
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    values = make_config(run={"dir": "runs/a"}, data={"path": "data"})
    train(values)
    monkeypatch.chdir(tmp_path)
    config = configuration.load(project / "runs" / "a" / "config.yaml")
    assert config.run.dir == project / "runs" / "a"
    assert config.data.path == project / "data"
    checkpoint = store.resolve(project / "runs" / "a")
    assert checkpoint.tokenizer == project / "data" / "tokenizer"
    # Tables and models name the run as it was named when it started.
    assert checkpoint.origin["run"] == "project/runs/a"
    monkeypatch.chdir(project / "data")
    assert checkpoint.origin["run"] == str(project / "runs" / "a")


def test_what_the_run_began_with_may_be_gone(
    project: Path, make_config: MakeConfig, train: Any, caplog: Any
) -> None:
    expected = whole(make_config, train, project)
    values = stage_2(make_config, project)
    shutil.rmtree(project / "learn")
    (project / "table.json").unlink()
    with caplog.at_level(logging.INFO, "megaconsa"):
        check_inputs(build(values))
    assert "table.json is gone; the run continues with its own table" in caplog.text
    assert computed(train(values)) == computed(expected)


def test_another_table_is_refused_whatever_its_name(project: Path, make_config: MakeConfig) -> None:
    head_share(4, 4, 8, 0.25).save(project / "table.json")
    with pytest.raises(InputError, match=r"table.json has changed since run .* began"):
        check_inputs(build(stage_2(make_config, project)))


def test_before_the_first_checkpoint_the_start_counts(
    project: Path, make_config: MakeConfig
) -> None:
    values = stage_2(make_config, project)
    shutil.rmtree(project / "train" / "checkpoints")
    check_inputs(build(values))
    shutil.copytree(project / "learn", project / "other")
    values["model"]["init_from"] = str(project / "other")
    with pytest.raises(InputError, match=r"another configuration \(model.init_from: "):
        check_inputs(build(values))


def test_a_missing_table_of_a_new_run_is_refused(project: Path, make_config: MakeConfig) -> None:
    (project / "table.json").unlink()
    with pytest.raises(InputError, match=r"table.json does not exist"):
        check_inputs(build(stage_2(make_config, project, "new")))


def test_config_files_that_are_no_runs_stay_as_they_are(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    values = make_config(run={"dir": "/gone/run"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert str(configuration.load(tmp_path / "config.yaml").run.dir) == "/gone/run"
