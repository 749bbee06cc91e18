"""Whole studies on the CPU, run by the command in separate processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa import run_folder
from megaconsa.reporting.metrics import read_metrics
from tests.support import ROOT

PATIENCE_SECONDS = 120.0
ARMS: dict[str, Any] = {"dense": {"rule": "dense"}, "evidence": {"learn": {}, "scope": "global"}}
LONG_LEARNING = {"training.steps": 200, "gates.warmup_steps": 8, "checkpoint.every": 20}
"""Long enough to be killed halfway."""


def begin(study: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "megaconsa.cli",
        "sweep",
        str(study),
        "--out",
        str(out),
        *options,
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def sweep(study: Path, out: Path, *options: str) -> tuple[int, str]:
    """Runs a study and returns its exit code and output."""
    process = begin(study, out, *options)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def await_rows(run: Path, count: int) -> None:
    """Waits until a run has trained `count` steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{run} did not come to step {count}"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_cpu_study_gives_a_table_and_a_page(small_data: Path, tmp_path: Path) -> None:
    """Runs the study of the repository on smaller data and with fewer steps."""
    folder = ROOT / "configs"
    base = yaml.safe_load((folder / "study_cpu_base.yaml").read_text())
    base["data"]["path"] = str(small_data)
    base["model"]["vocab_size"] = 512
    base["training"] |= {"sequence_length": 64, "steps": 16}
    (tmp_path / "study_cpu_base.yaml").write_text(yaml.safe_dump(base))
    study = yaml.safe_load((folder / "study_cpu.yaml").read_text())
    study |= {"start": {"training.steps": 16}, "needles": {"lengths": [56], "count": 1}}
    study["learn"] |= {"training.steps": 16}
    study["train"] |= {"training.steps": 12, "training.warmup_steps": 0}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    out = tmp_path / "out"

    code, said = sweep(path, out, "--jobs", "2")
    assert code == 0, said
    assert "12/12" in said
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())}
    assert list(rows) == list(study["arms"])
    assert rows["dense"]["difference"] is None
    assert rows["all-windowed"]["difference"]["over"] == "sequences"
    assert rows["all-windowed"]["sparsity"] == 1
    assert rows["evidence"]["difference"]["over"] == "runs"
    assert rows["evidence"]["sparsity"] == 0.5
    assert rows["evidence"]["cost"] > 0
    assert rows["evidence"]["common_best"] >= 8  # two sets of ten out of 12 units share 8 or more
    assert 0 <= rows["evidence"]["leave_one_out_overlap"] <= 1
    assert rows["leave-one-out"]["leave_one_out_overlap"] is None
    page = (out / "study.html").read_text()
    assert page.count("<svg") == 2
    assert "evidence" in page
    # Only what is read again is kept: the checkpoint of the start.
    assert [path.parent.name for path in out.rglob("checkpoints")] == ["start"]
    assert list((out / "trials" / "evidence-0.5-seed0" / "learn").glob("gates.json"))


@pytest.mark.slow
def test_an_interrupted_study_resumes(write_study: Callable[..., Path], tmp_path: Path) -> None:
    """The study is asked to stop, then its job is killed, then it finishes.

    Nothing that was done is done again.
    """
    study = write_study(arms=ARMS, learn=LONG_LEARNING)
    out = tmp_path / "out"
    learn = out / "trials" / "evidence-0.5-seed0" / "learn"

    process = begin(study, out)
    await_rows(learn, 30)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, said
    assert "the same command resumes" in said
    stopped_at = len(read_metrics(learn / "metrics.jsonl"))

    process = begin(study, out)
    await_rows(learn, stopped_at + 50)
    os.kill(json.loads((learn / run_folder.LOCK).read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, said
    assert "failed: learn-evidence-0.5-seed0: killed by SIGKILL" in said
    # Jobs that do not depend on the killed one were done.
    dense = out / "trials" / "dense-seed0" / "measures.json"
    written = dense.stat().st_mtime_ns

    code, said = sweep(study, out)
    assert code == 0, said
    assert dense.stat().st_mtime_ns == written
    steps = [row["step"] for row in read_metrics(learn / "metrics.jsonl")]
    assert steps == list(range(1, 201))
    log = (out / "logs" / "train-evidence-0.5-seed0.log").read_text()
    assert f"weights and optimizer from {out}/start" in log

    code, said = sweep(study, out)
    assert code == 0, said
    assert "jobs to run" not in said


def test_a_job_that_is_refused_says_why(write_study: Callable[..., Path], tmp_path: Path) -> None:
    """A job checks the folder of its run only when its turn has come."""
    study = write_study(arms={"dense": {"rule": "dense"}})
    out = tmp_path / "out"
    folder = out / "trials" / "dense-seed0"
    folder.mkdir(parents=True)
    (folder / "train").write_text("not a folder")
    code, said = sweep(study, out)
    assert code == 1
    assert "failed: train-dense-seed0: error: run.dir=" in said
    assert "is not a folder" in said


@pytest.mark.slow
def test_the_whole_budget_trains_two_legs(write_study: Callable[..., Path], tmp_path: Path) -> None:
    """Rule, score and learning arms have the same learning rate at every step."""
    options = {"whole_budget": True, "scope": "global"}
    arms: dict[str, Any] = {
        "dense": {"rule": "dense", "whole_budget": True},
        "leave-one-out": {"score": "leave-one-out", "options": {"sequences": 4}} | options,
        "evidence": {"learn": {}} | options,
    }
    study = write_study(
        arms=arms,
        learn={"training.steps": 24, "gates.warmup_steps": 8, "training.learning_rate": 0.002},
    )
    out = tmp_path / "out"
    code, said = sweep(study, out)
    assert code == 0, said
    assert "first-dense-seed0: validation loss" in said
    trials = out / "trials"
    legs = {
        "dense-seed0": "first",
        "leave-one-out-0.5-seed0": "first",
        "evidence-0.5-seed0": "learn",
    }
    schedules = []
    for name, leg in legs.items():
        rows = read_metrics(trials / name / leg / "metrics.jsonl")
        rows += read_metrics(trials / name / "train" / "metrics.jsonl")
        schedules.append([row["learning_rate"] for row in rows])
        log = (out / "logs" / f"train-{name}.log").read_text()
        assert f"weights and optimizer from {trials / name / leg}" in log
    assert len(schedules[0]) == 24 + 4
    assert schedules[0] == schedules[1] == schedules[2]
    assert [path.parent.name for path in out.rglob("checkpoints")] == ["start"]
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())}
    assert rows["evidence"]["leave_one_out_difference"]["over"] == "sequences"
    assert rows["leave-one-out"]["leave_one_out_difference"] is None

    code, said = sweep(study, out)
    assert code == 0, said
    assert "jobs to run" not in said
