"""`megaconsa checkpoints`, `verify`, and the mean of several checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megaconsa.checkpoint import store


@pytest.fixture
def run(make_config: Callable[..., dict[str, Any]], train: Any) -> Path:
    values = make_config(
        allocation={"source": "rule", "rule": "interleaved", "ratio": 1},
        checkpoint={"every": 2, "keep": 3},
    )
    train(values)
    return Path(values["run"]["dir"])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list(run: Path, done: Callable[..., str]) -> None:
    lines = done("checkpoints", run).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["step_6", "step_4", "step_2"]
    rows = {
        row["step"]: row
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    assert lines[1].split()[1:4] == [
        "1,536",
        f"{rows[6]['loss']:.4f}",
        f"{rows[6]['validation_loss']:.4f}",
    ]
    assert all(line.endswith("whole") for line in lines[1:])
    (run / "checkpoints" / "step_4" / "model.safetensors").unlink()
    (run / "checkpoints" / "step_2" / "state.json").write_text("{")
    lines = done("checkpoints", run).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["whole", "damaged", "damaged"]
    assert "step_4/model.safetensors is missing" in lines[4]
    assert "step_2 cannot be read" in lines[5]


def test_verify(run: Path, done: Callable[..., str], megaconsa: Any) -> None:
    assert "3 checkpoints, every file as it was written" in done("verify", run)
    damage(run / "checkpoints" / "step_4" / "optimizer.safetensors")
    outcome = megaconsa("verify", run)
    assert outcome.code == 1
    assert outcome.err.strip().endswith("step_4/optimizer.safetensors does not match its checksum")
    assert "1 checkpoint, every file" in done("verify", run / "checkpoints" / "step_6")


def test_what_holds_none_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "holds no checkpoints" in refused("checkpoints", tmp_path)
    assert "neither a checkpoint nor a run folder" in refused("verify", tmp_path)


def test_a_young_run_has_no_checkpoint_yet(tmp_path: Path, done: Callable[..., str]) -> None:
    (tmp_path / "config.yaml").write_text("run: {}\n")
    assert "no checkpoint yet" in done("checkpoints", tmp_path)


def test_the_mean_of_checkpoints_is_exported(
    run: Path, done: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    said = done(
        "export-hf",
        run,
        "--average",
        "3",
        "--out",
        tmp_path / "hf",
        "--dtype",
        "float32",
        "--verify",
        "32",
    )
    assert "logits differ from the checkpoint's by" in said
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    saved = [store.read(path).weights() for path in store.committed(run)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert (exported[name] == (sum(each[name].double() for each in saved) / 3).float()).all()
    assert '"averaged_steps"' in (tmp_path / "hf" / "README.md").read_text()
    assert "holds 3 checkpoints, not 4" in refused(
        "export-hf", run, "--average", "4", "--out", tmp_path / "other"
    )
    damage(run / "checkpoints" / "step_2" / "model.safetensors")
    assert "damaged" in refused("export-hf", run, "--average", "3", "--out", tmp_path / "other")
    shutil.rmtree(tmp_path / "hf")


def test_other_forms_hold_the_same_rows(
    run: Path, done: Callable[..., str], megaconsa: Any
) -> None:
    rows = json.loads(done("checkpoints", run, "--json"))
    assert [row["checkpoint"] for row in rows] == ["step_6", "step_4", "step_2"]
    assert rows[0]["size"] == store.read(run / "checkpoints" / "step_6").bytes
    read = list(csv.DictReader(done("checkpoints", run, "--csv").splitlines()))
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]
    lines = done("checkpoints", run, "--markdown").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| step_6", "| step_4", "| step_2"]
    # Faults leave stdout to the rows.
    (run / "checkpoints" / "step_4" / "model.safetensors").unlink()
    outcome = megaconsa("checkpoints", run, "--json")
    assert [row["files"] for row in json.loads(outcome.out)] == ["whole", "damaged", "whole"]
    assert "model.safetensors is missing" in outcome.err
