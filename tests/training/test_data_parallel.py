"""Two processes train as one does, and either takes over from the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.reporting.metrics import read_metrics


def torchrun(processes: int, values: dict[str, Any], folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # left behind by tests that train in this process
    done = subprocess.run([*launcher, "-m", "megaconsa.train", str(config)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(make_config: Callable[..., dict[str, Any]], train: Callable[..., Any], tmp_path: Path) -> None:
    one = train(make_config(run={"dir": str(tmp_path / "one")}))
    values = make_config(run={"dir": str(tmp_path / "two")})
    torchrun(2, values, tmp_path)
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "expected_sparsity", "sampled_sparsity", "gate_grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-9), (a["step"], name)
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-5)


def test_a_run_of_two_processes_goes_on_in_one(
    make_config: Callable[..., dict[str, Any]], train: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    whole = train(make_config(run={"dir": str(tmp_path / "whole")}))
    values = make_config(run={"dir": str(tmp_path / "moved")})
    torchrun(2, values, tmp_path)
    run = tmp_path / "moved"
    shutil.rmtree(run / "checkpoints" / "step_6")  # as if it had been killed after step 4
    rows = train(values)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole, rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
