"""`megaconsa status` and metrics.prom, also while a run is writing in its folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.files import duration
from megaconsa.incidents import record
from megaconsa.parallel.launcher import VARIABLES
from megaconsa.reporting import status as reporting
from megaconsa.reporting.metrics import read_metrics
from megaconsa.reporting.status import newest_rows, status

MakeConfig = Callable[..., dict[str, Any]]


def listing(run: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in run.rglob("*")}


def test_a_finished_run(finished: Callable[[str], Path], done: Callable[..., str]) -> None:
    run = finished("heads")
    before = listing(run)
    text = done("status", run)
    rows = read_metrics(run / "metrics.jsonl")
    assert f"{run}: finished\n" in text
    assert "6 of 6 (100.0%), 1,536 tokens" in text
    assert f"{rows[-1]['loss']:.4f}, validation {rows[-1]['validation_loss']:.4f}" in text
    assert re.search(r"checkpoint +step 6, \d+(\.\d+)? [KM]iB, \d+ ", text)
    assert "0.250 wanted" in text
    assert "to go" not in text
    found = json.loads(done("status", run, "--json"))
    assert found["tokens_per_second"] == pytest.approx(
        sum(row["tokens_per_second"] for row in rows) / 6
    )
    assert (found["state"], found["mfu"], found["holder"], found["skipped"]) == (
        "finished",
        None,
        None,
        0,
    )
    assert listing(run) == before


def test_a_run_on_a_table(finished: Callable[[str], Path]) -> None:
    assert status(finished("trained")).target_sparsity == 0.5


def test_while_it_trains_and_after_it_was_killed(make_config: MakeConfig, tmp_path: Path) -> None:
    values = make_config(training={"steps": 100_000}, checkpoint={"every": 20})
    config = tmp_path / "config.yaml"
    run = Path(values["run"]["dir"])
    config.write_text(yaml.safe_dump(values))
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    training = subprocess.Popen(
        [sys.executable, "-m", "megaconsa.train", config],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "step_20").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Some of these calls happen while a row or a checkpoint is being written.
        found = [status(run) for _ in range(200)]
        assert {each.state for each in found} == {"training"}
        assert all(each.step >= 20 and each.checkpoint is not None for each in found)
        assert f"process {training.pid} on " in str(found[-1].holder)
        assert found[-1].remaining_seconds is not None
        assert 0 <= found[-1].seconds_since_step < 30  # type: ignore[operator]
        training.send_signal(signal.SIGKILL)
        training.wait()
        assert status(run).state == "stopped"
        assert status(run).holder is None
        assert status(run).remaining_seconds is None
    finally:
        training.kill()


def copy_of(run: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", run, to], check=True)
    return to


def test_torn_files_and_incidents(
    finished: Callable[[str], Path], done: Callable[..., str], tmp_path: Path
) -> None:
    run = copy_of(finished("heads"), tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (run / "checkpoints" / "step_6" / "manifest.json").write_text("{")
    (run / ".lock").write_text('{"host": "node7", "pid": 12, "since": "2026-11-24 10:00:00"}')
    (run / "stop").touch()
    for step in range(1, 8):
        record(run, "skipped", "its gradient is not finite", step=step, rank=0)
    record(run, "error", "a planted error", step=None, rank=1)
    text = done("status", run)
    assert "training (process 12 on node7, since 2026-11-24 10:00:00)" in text
    assert "step 4, " in text
    assert "asked for by the file stop" in text
    assert text.count("not finite") == 4
    assert "error, while starting: a planted error" in text
    os.utime(run / "metrics.jsonl", (0, time.time() - 3600))
    assert status(run).state == "silent"


def test_only_the_end_of_a_long_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "TAIL_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    assert [row["step"] for row in newest_rows(path)] == list(range(993, 1000))


def test_what_is_no_run_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"{tmp_path} is not a run folder" in refused("status", tmp_path)


def test_durations() -> None:
    said = {
        0: "0 s",
        59.6: "1 min 0 s",
        3601: "1 h 0 min",
        90000: "1 d 1 h",
        86400 * 40: "40 d 0 h",
    }
    assert {seconds: duration(seconds) for seconds in said} == said


def test_it_loads_no_torch() -> None:
    script = (
        "import sys; import megaconsa.reporting.status, megaconsa.reporting.status_lines; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_prometheus_reads_the_newest_numbers(finished: Callable[[str], Path]) -> None:
    run = finished("heads")
    text = (run / "metrics.prom").read_text()
    line = re.compile(r'(?:# TYPE (\w+) (?:gauge|counter)\n)(\w+)\{run="(?:[^"\\]|\\.)*"\} (\S+)\n')
    assert line.sub("", text) == ""
    values = {name: float(value) for _, name, value in line.findall(text)}
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert values["megaconsa_loss"] == row["loss"]
    assert (values["megaconsa_step"], values["megaconsa_steps"], values["megaconsa_skipped"]) == (
        6,
        6,
        0,
    )
    assert (
        abs(
            values["megaconsa_last_step_timestamp_seconds"]
            - (run / "metrics.jsonl").stat().st_mtime
        )
        < 60
    )
    assert not list(run.glob("*.tmp"))
