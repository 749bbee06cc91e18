"""`megaconsa bench-training` on two CPU processes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.benchmarks.profile.recording import record
from megaconsa.benchmarks.profile.trace import read_trace
from megaconsa.benchmarks.training.layouts import Layout
from megaconsa.config import build
from megaconsa.errors import InputError, RunError
from megaconsa.parallel import mesh
from megaconsa.tools import bench_training
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer


@pytest.fixture
def configuration(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config()))
    return path


@pytest.mark.slow
def test_each_topology_stands_beside_one_process(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    bench_training.main(configuration, topology=["data=2"], steps=3, skip=1, out=out)
    one, two = json.loads(out.read_text())["measurements"]
    assert (one["layout"], one["speedup"], one["loss_deviation"]) == (
        {"tensor": 1, "context": 1, "pipeline": 1, "data": 1},
        1,
        0,
    )
    assert two["layout"]["data"] == 2
    assert two["speedup"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"])
    assert two["tokens_per_second"] == pytest.approx(4 * 64 / two["step_seconds"])
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)
    # Without a GPU there is nothing to trace.
    assert two["communicating"] is None
    assert two["idle"] is None
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["loss_deviation"] < 1e-5
    printed = capsys.readouterr().out
    assert "data=2" in printed
    assert "speed-up" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "config.yaml"]


@pytest.mark.parametrize("controller", ["evidence", "paper"])
def test_steps_are_traced_after_the_last_one(
    controller: str, make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    gates = {"controller": controller, "warmup_steps": 1, "learning_rate": 2}
    learn = {"source": "learn"}
    values = make_config(allocation=learn, gates=gates, training={"steps": 3})
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    assert trainer.run()
    record(trainer, 1, tmp_path / "trace.json.gz")
    assert len(read_trace(tmp_path / "trace.json.gz").steps) == 1


@pytest.mark.parametrize("controller", ["evidence", "paper"])
def test_a_learning_run_of_twenty_steps_is_measured(
    controller: str, make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The run's own warm-up of the gates is longer."""
    path = tmp_path / "config.yaml"
    values = make_config(
        allocation={"source": "learn"},
        gates={"controller": controller, "warmup_steps": 50},
        training={"steps": 200},
    )
    path.write_text(yaml.safe_dump(values))
    out = tmp_path / "bench.json"
    bench_training.main(path, out=out)
    (measured,) = json.loads(out.read_text())["measurements"]
    assert len(measured["losses"]) == 20


@pytest.mark.parametrize(
    "text", ["tensor", "tensor=0", "tensor=x", "model=2", "tensor=2,tensor=2", ""]
)
def test_a_topology_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="topology"):
        Layout.parse(text)


def test_what_cannot_run_is_refused_before_anything_runs(configuration: Path) -> None:
    with pytest.raises(InputError, match="micro-batches"):
        bench_training.main(configuration, topology=["pipeline=2,data=2"], steps=3, skip=1)
    with pytest.raises(InputError, match="--skip"):
        bench_training.main(configuration, steps=3, skip=3)


@pytest.mark.slow
def test_the_failing_rank_is_heard(
    configuration: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of the started ranks fails.

    A module that Python imports at its start plants the error.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from megaconsa.training.trainer import Trainer\n"
        "    def step(self):\n"
        "        raise RuntimeError('CUDA out of memory, planted')\n"
        "    Trainer.step = step\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match=r"rank 1 of 2.*\n(?s:.*)CUDA out of memory, planted"):
        bench_training.main(configuration, topology=["data=2"], steps=3, skip=1)
