"""Bad input ends with one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa import cli
from tests.support.disks import damage_all_rows

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `megaconsa ...`, which must exit with code 2.

    Returns the one line that it printed to stderr.
    """

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["megaconsa", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def write(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"lerning_rate": 1e-3}}, "did you mean training.learning_rate?"),
        ({"parallel": {"tensor": 8}}, "parallel.tensor=8 exceeds the model's 4 KV heads"),
        ({"attention": {"window": 0}}, "attention.window=0 must lie between 1 and"),
        (
            {"attention": {"window": 65}},
            "attention.window=65 must lie between 1 and training.sequence_length=64",
        ),
        (
            {"allocation": {"scope": "per_layer", "sparsity": 0.3}},
            "possible are 0, 0.25, 0.5, 0.75, 1",
        ),
        (
            {"allocation": {"scope": "per_layer", "granularity": "layer"}},
            "use allocation.scope=global",
        ),
        ({"data": {"path": "/nowhere/data"}}, "no such folder"),
        ({"training": {"sequence_length": 32}}, "was packed into sequences of 64"),
        (
            {"model": {"vocab_size": 4096}},
            "was tokenised with a vocabulary of 512, but the model has 4096",
        ),
        ({"attention": {"backend": "flash"}}, "attention.backend=flash: flash "),
        ({"attention": {"backend": "triton"}}, "attention.backend=triton: triton "),
        ({"model": {"init_from": "/nowhere/run"}}, "does not exist"),
        ({"validation": {"sequences": 1}}, "less than one micro batch"),
    ],
)
def test_configuration(
    sections: dict[str, Any], said: str, make_config: MakeConfig, refused: Any, tmp_path: Path
) -> None:
    values = make_config(**sections)
    config = write(values, tmp_path / "config.yaml")
    assert said in refused("train", config)
    assert not Path(values["run"]["dir"]).exists()


def test_empty_data_folder(make_config: MakeConfig, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = write(make_config(data={"path": str(tmp_path / "empty")}), tmp_path / "config.yaml")
    assert "it has no dataset.json" in refused("train", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "empty"]


def test_missing_shard_is_named(
    make_config: MakeConfig, refused: Any, small_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("shard.*"))
    shard.unlink()
    config = write(make_config(data={"path": str(tmp_path / "data")}), tmp_path / "config.yaml")
    assert shard.name in refused("train", config)


def test_corrupt_shard_ends_the_run_with_its_name(
    make_config: MakeConfig,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("shard.*"))
    damage_all_rows(shard)
    config = write(make_config(data={"path": str(tmp_path / "data")}), tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["megaconsa", "train", str(config)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert shard.name in capsys.readouterr().err


def test_run_folder_of_another_configuration(
    make_config: MakeConfig, refused: Any, train: Any, tmp_path: Path
) -> None:
    values = make_config()
    train(values)
    before = {path: path.stat().st_mtime_ns for path in Path(values["run"]["dir"]).rglob("*")}
    values["training"]["learning_rate"] = 1e-4
    message = refused("train", write(values, tmp_path / "config.yaml"))
    assert "training.learning_rate: 0.003 -> 0.0001" in message
    assert {
        path: path.stat().st_mtime_ns for path in Path(values["run"]["dir"]).rglob("*")
    } == before


def test_allocation_of_another_shape(make_config: MakeConfig, refused: Any, tmp_path: Path) -> None:
    from megaconsa.consa.rules import dense

    dense(2, 4, 8).save(tmp_path / "allocation.json")
    values = make_config(allocation={"source": "file", "file": str(tmp_path / "allocation.json")})
    message = refused("train", write(values, tmp_path / "config.yaml"))
    assert "was made for 2 layers x 4 KV heads, but the model has 4 x 4" in message
    assert not Path(values["run"]["dir"]).exists()


def test_other_vocabulary_than_the_checkpoint(
    make_config: MakeConfig, refused: Any, train: Any, small_data: Path, tmp_path: Path
) -> None:
    train(make_config(run={"dir": str(tmp_path / "learn")}))
    shutil.copytree(small_data, tmp_path / "other")
    info = json.loads((tmp_path / "other" / "dataset.json").read_text())
    (tmp_path / "other" / "dataset.json").write_text(
        json.dumps(info | {"tokenizer_fingerprint": "0" * 16})
    )
    values = make_config(
        model={"init_from": str(tmp_path / "learn")},
        allocation={"source": "rule", "rule": "dense"},
        data={"path": str(tmp_path / "other")},
    )
    assert "another vocabulary" in refused("train", write(values, tmp_path / "config.yaml"))


def test_tools(refused: Any, make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    values = make_config(allocation={"source": "rule", "rule": "dense"})
    train(values)
    run = values["run"]["dir"]
    assert "did not learn an allocation" in refused(
        "finalize-masks", run, "--out", tmp_path / "a.json"
    )
    assert "does not exist" in refused(
        "finalize-masks", tmp_path / "none", "--out", tmp_path / "a.json"
    )
    assert not (tmp_path / "a.json").exists()
    assert "does not exist" in refused("export-hf", tmp_path / "none", "--out", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_two_processes_in_one_run_folder(
    make_config: MakeConfig, refused: Any, tmp_path: Path
) -> None:
    from megaconsa.training.callbacks.run_lock import RunLock

    values = make_config()
    lock = RunLock(Path(values["run"]["dir"]))
    assert "is in use" in refused("train", write(values, tmp_path / "config.yaml"))
    assert [path.name for path in Path(values["run"]["dir"]).iterdir()] == [".lock"]
    lock.release()


def test_no_usable_checkpoint_is_not_a_fresh_start(
    make_config: MakeConfig, refused: Any, train: Any, tmp_path: Path
) -> None:
    values = make_config()
    train(values)
    run = Path(values["run"]["dir"])
    rows = (run / "metrics.jsonl").read_text()
    for state in run.glob("checkpoints/step_*/state.json"):
        state.write_text("{}")
    assert "none of the 2 checkpoints" in refused("train", write(values, tmp_path / "config.yaml"))
    assert (run / "metrics.jsonl").read_text() == rows


def test_the_checkpoints_configuration_counts(
    make_config: MakeConfig, refused: Any, train: Any, tmp_path: Path
) -> None:
    """The configuration may not change even if config.yaml is torn or missing.

    The checkpoint holds it too.
    """
    values = make_config()
    train(values)
    (Path(values["run"]["dir"]) / "config.yaml").write_text("")
    values["allocation"] = {"source": "rule", "rule": "dense"}
    assert "allocation.source: learn -> rule" in refused(
        "train", write(values, tmp_path / "config.yaml")
    )


def test_a_torn_configuration_without_checkpoints_starts_clean(
    make_config: MakeConfig, train: Any
) -> None:
    values = make_config()
    Path(values["run"]["dir"]).mkdir()
    (Path(values["run"]["dir"]) / "config.yaml").write_text("run: {dir")
    assert len(train(values)) == 6


def test_run_folder_below_a_file(make_config: MakeConfig, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = make_config(run={"dir": str(tmp_path / "file" / "run")})
    assert "is not a folder" in refused("train", write(values, tmp_path / "config.yaml"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_diverged_run_ends_and_keeps_its_checkpoints(
    precision: str,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    values = make_config(
        training={
            "learning_rate": 1e30,
            "min_learning_rate": 1e29,
            "steps": 20,
            "precision": precision,
        },
        checkpoint={"every": 1},
    )
    monkeypatch.setattr(
        sys, "argv", ["megaconsa", "train", str(write(values, tmp_path / "config.yaml"))]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "lower training.learning_rate" in capsys.readouterr().err
    rows = (Path(values["run"]["dir"]) / "metrics.jsonl").read_text()
    assert "Infinity" not in rows
    assert "NaN" not in rows
