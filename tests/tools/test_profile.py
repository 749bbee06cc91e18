"""`megaconsa profile` on CPU processes, and what it refuses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megaconsa.benchmarks.profile.trace import read_trace
from megaconsa.errors import InputError
from megaconsa.tools import profile_training

Write = Callable[..., Path]


@pytest.fixture
def write(
    make_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Write:
    """Writes a configuration. The processes use the CPU, except in tests that ask for a GPU."""

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def configuration(**sections: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(make_config(**sections)))
        return path

    return configuration


def test_a_learning_run(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part of the step is found, in each pass."""
    configuration = write(training={"activation_checkpointing": True})
    out = tmp_path / "profiles" / "one"
    profile_training.main(configuration, out, steps=2, skip=1)
    figures = json.loads((out / "profile.json").read_text())
    assert figures["device"] == "cpu"
    assert figures["step_ms_without_profiler"] > 0
    (rank,) = figures["ranks"]
    assert rank["steps"] == 2
    passes = {part: set(work["passes"]) for part, work in rank["parts"].items()}
    layer = {"forward", "backward"}
    block = {"forward", "forward again", "backward"}
    expected = {
        "embedding": layer,
        "attention": block,
        "MLP": block,
        "block": block,
        "final norm": layer,
        "head and loss": layer,
        "optimizer": {"neither"},
        "gates": {"neither"},
        "data": {"neither"},
    }
    assert expected.items() <= passes.items()
    whole = sum(amount["ms"] for amount in rank["names"].values())
    in_parts = sum(a["ms"] for work in rank["parts"].values() for a in work["passes"].values())
    assert in_parts == pytest.approx(whole)
    assert whole <= rank["step_ms"]
    # What no part claims is little.
    other = sum(amount["ms"] for amount in rank["parts"]["other"]["passes"].values())
    assert other < 0.2 * whole
    assert len(read_trace(out / "rank_0" / "trace.json.gz").steps) == 2
    printed = capsys.readouterr().out
    assert "head and loss" in printed
    assert "aten::" in printed
    assert "no GPU" in printed
    # Nothing but the folder was written.
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "rank_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "profiles"]
    assert [path.name for path in out.parent.iterdir()] == ["one"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [[], ["parallel.pipeline=2"], ["parallel.tensor=2", "model.tie_word_embeddings=false"]],
)
def test_every_rank_is_profiled(
    fields: list[str],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    profile_training.main(write(), out, fields, steps=1, skip=1, processes=2)
    ranks = json.loads((out / "profile.json").read_text())["ranks"]
    assert len(ranks) == 2
    parts = ranks[0]["parts"].keys() | ranks[1]["parts"].keys()
    assert {"embedding", "attention", "MLP", "final norm", "head and loss", "optimizer"} <= parts
    assert ("pipeline transfer" in parts) == (fields == ["parallel.pipeline=2"])
    assert (out / "rank_1" / "trace.json.gz").is_file()
    assert "rank 1" in capsys.readouterr().out


def test_what_cannot_run_is_refused_before_anything_runs(
    write: Write, refused: Callable[..., str], tmp_path: Path
) -> None:
    configuration = write()
    out = tmp_path / "out"
    assert "micro-batches" in refused(
        "profile", configuration, "parallel.pipeline=2", "--processes", 4, "--out", out
    )
    assert not out.exists()
    assert "exists" in refused("profile", configuration, "--out", tmp_path)
    assert "not a folder" in refused("profile", configuration, "--out", configuration / "out")


def test_a_file_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="not a trace"):
        read_trace(path)
    path.write_bytes(gzip.compress(b'{"traceEvents": []}'))
    with pytest.raises(InputError, match="no steps"):
        read_trace(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_on_a_gpu(
    checkpointing: bool, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = write(training={"activation_checkpointing": checkpointing})
    out = tmp_path / "out"
    profile_training.main(configuration, out, steps=2, skip=2)
    (rank,) = json.loads((out / "profile.json").read_text())["ranks"]
    device = rank["device"]
    times = (device["computing_ms"], device["communicating_ms"], device["idle_ms"])
    assert sum(times) == pytest.approx(rank["step_ms"], rel=0.01)
    assert sum(device["idle"].values()) == pytest.approx(device["idle_ms"])
    # The profiler has lost no launch.
    assert "unknown" not in device["idle"]
    # The time of each kernel is in one group and one part.
    kernels = sum(amount["ms"] for amount in rank["names"].values())
    for table in (rank["groups"], rank["parts"]):
        assert sum(
            amount["ms"] for work in table.values() for amount in work["passes"].values()
        ) == pytest.approx(kernels)
    layer = {"forward", "backward"}
    for part in ("embedding", "block", "final norm", "head and loss"):
        assert layer <= rank["parts"][part]["passes"].keys(), part
    assert ("forward again" in rank["parts"]["block"]["passes"]) == checkpointing
    assert {"optimizer", "gates", "data"} <= rank["parts"].keys()
    assert {"matrix products", "attention", "cross-entropy"} <= rank["groups"].keys()
    # The host waits before AdamW, and not at the end of a step.
    waits = {(wait["place"], wait["call"]) for wait in rank["waits"]}
    assert ("optimizer", "cudaStreamSynchronize") in waits
    assert "cudaDeviceSynchronize" not in {call for _, call in waits}
    assert (out / "rank_0" / "memory.pickle").stat().st_size > 0
    assert "GPU idle" in capsys.readouterr().out
