"""What a run records about the code, command and machine that produced it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa import __version__, provenance
from megaconsa.errors import InputError
from tests.support import ROOT
from tests.support.interruptions import StopAfter, interrupted


def test_each_start_has_an_entry(
    make_config: Callable[..., dict[str, Any]], train: Callable[..., Any]
) -> None:
    values = make_config()
    run = Path(values["run"]["dir"])
    interrupted(values, StopAfter(2))
    (stopped,) = provenance.load_starts(run)
    train(values)
    first, second = provenance.load_starts(run)
    assert first == stopped
    assert (first.first_step, first.last_step) == (0, 2)
    assert (second.first_step, second.last_step) == (2, 6)
    assert first.ended is not None
    assert datetime.fromisoformat(first.started) <= datetime.fromisoformat(first.ended)
    assert second.version == __version__
    assert torch.__version__.startswith(second.libraries["torch"])
    # The one by which these tests were started.
    assert second.command == first.command != ""
    assert len(second.hosts) == 1
    assert list(second.devices.values()) == [1]


def test_a_damaged_file_does_not_end_the_run(
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = make_config()
    path = Path(values["run"]["dir"]) / "provenance.json"
    path.parent.mkdir()
    path.write_text('{"starts": [{"wrong": 1}]}')
    with pytest.raises(InputError, match="remove it"):
        provenance.load_starts(path.parent)
    train(values)
    assert "the record of earlier starts is lost" in caplog.text
    assert len(provenance.load_starts(path.parent)) == 1


def test_commands_are_shown_as_typed() -> None:
    script = ["/venv/bin/megaconsa", "train", "a.yaml", "run.dir=my runs"]
    typed = "megaconsa train a.yaml 'run.dir=my runs'"
    assert provenance.command_line(script, ["/venv/bin/python", *script]) == typed
    module = ["/site/megaconsa/train.py", "a.yaml"]
    original = ["/venv/bin/python", "-u", "-m", "megaconsa.train", "a.yaml"]
    assert provenance.command_line(module, original) == "python -m megaconsa.train a.yaml"


def test_commit_of_the_source_and_not_of_a_checkout_around_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *name, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert provenance.source_commit(package) == (commit, False)
    (package / "__init__.py").write_text("changed")
    assert provenance.source_commit(package) == (commit, True)
    installed = tmp_path / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.source_commit(installed)[0] != commit
    assert provenance.source_commit(ROOT / "megaconsa")[0] is not None
