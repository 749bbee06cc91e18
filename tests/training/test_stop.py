"""What stops a run: signals, the file RUN/stop, the end of the job's time.

The run saves first, and the same command resumes it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.reporting.metrics import read_metrics
from megaconsa.train import train
from megaconsa.training.callbacks import stop_requests
from tests.support.ranks import await_step, ended, start, write

MakeConfig = Callable[..., dict[str, Any]]
ENDLESS = {"steps": 100_000}


def saved_step(run: Path) -> int:
    newest = store.newest(run)
    assert newest is not None
    return newest.step


def test_a_stop_file_ends_the_run_with_code_0_and_is_removed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config()
    run = Path(values["run"]["dir"])
    run.mkdir()
    (run / "stop").touch()
    config = write(values, tmp_path)
    assert train(config, []) == 0
    assert saved_step(run) == 2
    assert not (run / "stop").exists()
    assert train(config, []) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_end_of_the_jobs_time_stops_the_run_early_enough(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_config(training=ENDLESS, checkpoint={"every": 0})
    needed = stop_requests.MARGIN_SECONDS + stop_requests.UNKNOWN_SAVE_SECONDS
    end = time.time() + needed + 8
    monkeypatch.setenv(stop_requests.END_TIME, f"{end:.0f}")
    assert train(write(values, tmp_path), []) == 75
    left = end - time.time()
    # The run trained for a while, and it stopped before the time that it reserves for saving.
    assert needed - 5 < left < needed + 6
    rows = read_metrics(Path(values["run"]["dir"]) / "metrics.jsonl")
    assert saved_step(Path(values["run"]["dir"])) == rows[-1]["step"] > 2


def test_a_hangup_that_nohup_has_ignored_stays_ignored(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config = write(make_config(training={"steps": 40}, checkpoint={"every": 0}), tmp_path)
        hangup = threading.Timer(1.0, signal.raise_signal, [signal.SIGHUP])
        hangup.start()
        assert train(config, []) == 0
        hangup.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_later_end_of_the_jobs_time_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(stop_requests.END_TIME, f"{time.time() + 3600:.0f}")
    assert train(write(make_config(training={"steps": 3}), tmp_path), []) == 0


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU],
    ids=lambda each: each.name,
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config(training=ENDLESS, checkpoint={"every": 0})
    run = Path(values["run"]["dir"])
    # Under nohup, the tests would pass on an ignored SIGHUP.
    inherited = signal.signal(number, signal.SIG_DFL)
    tasks = start(write(values, tmp_path))
    signal.signal(number, inherited)
    await_step(run, 3)
    tasks[1].send_signal(number)
    main, other = ended(tasks)
    assert (main.code, other.code) == (75, 75), main.err + other.err
    assert "stopped, the same command resumes it at step" in main.out
    assert saved_step(run) == read_metrics(run / "metrics.jsonl")[-1]["step"]
