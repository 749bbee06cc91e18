"""`megaconsa ...` in this process, and tiny finished runs for it.

Each run is trained once.
"""

from __future__ import annotations

import json
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
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes commands use the CPU on any machine, except in tests that ask for a GPU."""
    import torch

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def exports(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each kind."""
    from tests.support import exports

    folder = tmp_path_factory.mktemp("exports")
    for name, allocation in exports.ALLOCATIONS.items():
        exports.make_export(folder / name, allocation, small_data / "tokenizer")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Returns a function that reads the figures of an evaluation in tmp_path/out."""
    return lambda: json.loads((tmp_path / "out" / "evaluation.json").read_text())


@pytest.fixture
def megaconsa(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs `megaconsa ...` to its end.

    Anything except an exit with a code, such as a traceback, fails the test.
    """

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
    """Runs a command that must succeed and print nothing to stderr.

    Returns its stdout.
    """

    def run(*arguments: object) -> str:
        outcome = megaconsa(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return run


@pytest.fixture
def refused(megaconsa: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must be refused.

    Returns its one line on stderr.
    """

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
    """Returns the folder of a run by its name in ALLOCATIONS.

    All tests share it. Copy it before writing into it.
    """

    def folder(name: str) -> Path:
        if name not in finished_runs:
            run = tmp_path_factory.mktemp("runs") / name
            train(make_config(run={"dir": str(run)}, allocation=ALLOCATIONS[name]))
            finished_runs[name] = run
        return finished_runs[name]

    return folder
