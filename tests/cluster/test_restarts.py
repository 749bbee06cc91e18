"""When a job whose training failed is restarted, and when it is given up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa import reading
from megaconsa.cluster.restarts import NAME, record
from megaconsa.errors import InputError
from tests.support.disks import OUT_OF_REACH


def saved(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step}").mkdir(parents=True)


def test_failures_without_a_newer_checkpoint_end_it(tmp_path: Path) -> None:
    assert record(tmp_path, "7", 1, 3) == (
        True,
        "exit code 1, failure 1 of 3 since the start of the run",
    )
    assert record(tmp_path, "7", 76, 3) == (
        True,
        "exit code 76, failure 2 of 3 since the start of the run",
    )
    again, why = record(tmp_path, "7", 137, 3)
    assert not again
    assert why.startswith(
        "given up: failed 3 times in a row since the start of the run, without a newer checkpoint"
    )
    assert "(exit codes 1, 76, 137)" in why


def test_a_newer_checkpoint_or_another_job_begins_anew(tmp_path: Path) -> None:
    assert record(tmp_path, "7", 1, 2)[0]
    saved(tmp_path, 9)
    saved(tmp_path, 10)
    assert record(tmp_path, "7", 1, 2) == (
        True,
        "exit code 1, failure 1 of 2 since the checkpoint of step 10",
    )
    assert record(tmp_path, "8_1", 1, 2)[0]
    assert not record(tmp_path, "8_1", 1, 2)[0]
    kept = json.loads((tmp_path / NAME).read_text())
    assert [(failure["job"], failure["step"]) for failure in kept] == [
        ("7", 0),
        ("7", 10),
        ("8_1", 10),
        ("8_1", 10),
    ]


def test_a_checkpoint_that_was_lost_is_no_progress(tmp_path: Path) -> None:
    """A run that loses its newest checkpoint has made no progress.

    A damaged checkpoint is put aside and the run falls back. Counting the next one as progress
    would restart the job forever.
    """
    saved(tmp_path, 10)
    assert record(tmp_path, "7", 1, 2)[0]
    (tmp_path / "checkpoints" / "step_10").rename(tmp_path / "checkpoints" / "step_10.damaged")
    assert not record(tmp_path, "7", 1, 2)[0]
    saved(tmp_path, 8)
    assert not record(tmp_path, "7", 1, 2)[0]


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("[1]")
    with pytest.raises(InputError, match="remove it"):
        record(tmp_path, "7", 1, 3)
    assert (tmp_path / NAME).read_text() == "[1]"


def test_as_the_job_asks(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config()))
    command = [
        sys.executable,
        "-m",
        "megaconsa.cluster.restarts",
        "7",
        "1",
        "1",
        str(config),
        f"run.dir={tmp_path}/other",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout.startswith("given up: failed 1 times in a row")
    assert (tmp_path / "other" / NAME).is_file()


def test_storage_that_does_not_answer_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    record(tmp_path, "7", 1, 3)
    file = tmp_path / NAME
    aside = file.rename(tmp_path / "aside")
    file.symlink_to(OUT_OF_REACH)
    threading.Timer(0.5, lambda: aside.replace(file)).start()
    assert record(tmp_path, "7", 76, 3) == (
        True,
        "exit code 76, failure 2 of 3 since the start of the run",
    )
