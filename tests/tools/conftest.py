"""`megaconsa ...` in this process, and tiny finished runs for it to work on, each trained once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megaconsa import cli

RULE = {"source": "rule", "rule": "head-share", "sparsity": 0.5}
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "heads": {"source": "learn", "sparsity": 0.25},
    "layers": {"source": "learn", "sparsity": 0.5, "granularity": "layer", "scope": "global"},
    "trained": RULE,
    "stock": {"source": "rule", "rule": "interleaved", "ratio": 1},
}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def megaconsa(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs `megaconsa ...` to its end; anything but an exit with a code (a traceback) fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["megaconsa", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def done(megaconsa: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must succeed and keep stderr clean; returns its stdout."""

    def run(*arguments: object) -> str:
        outcome = megaconsa(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return run


@pytest.fixture
def refused(megaconsa: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one line on stderr."""

    def run(*arguments: object) -> str:
        outcome = megaconsa(*arguments)
        assert outcome.code == 2
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        return outcome.err

    return run


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(
    finished_runs: dict[str, Path],
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """The folder of a run by its name in ALLOCATIONS. Shared by all tests: copy it before writing into it."""

    def folder(name: str) -> Path:
        if name not in finished_runs:
            run = tmp_path_factory.mktemp("runs") / name
            train(make_config(run={"dir": str(run)}, allocation=ALLOCATIONS[name]))
            finished_runs[name] = run
        return finished_runs[name]

    return folder
