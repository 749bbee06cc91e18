"""Refusals and look-ups answer at once: they import nothing that takes seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import megaconsa
from tests.support import ROOT

SLOW = ("torch", "transformers", "deepspeed", "streaming", "matplotlib")
SCRIPT = f"""
import sys
from megaconsa import cli
sys.argv[0] = "megaconsa"
try:
    cli.main()
finally:
    loaded = [name for name in {SLOW} if name in sys.modules]
    print("loaded:", *loaded, file=sys.stderr)
"""


def answered(arguments: list[str], folder: Path) -> tuple[int, str, list[str]]:
    """Runs `megaconsa ...` in a process of its own.

    Returns its exit code, its output and the slow modules that it imported.
    """
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    *said, loaded = ended.stderr.strip().splitlines()
    return ended.returncode, ended.stdout + "\n".join(said), loaded.split()[1:]


@pytest.mark.parametrize(
    "command",
    [
        "train missing.yaml",
        "train {config} training.steps=many",
        "train {config} data.path=missing",
        "plan missing.yaml",
        "submit train missing.yaml",
        "sweep missing.yaml --out out",
        "bench-training missing.yaml",
        "bench-attention --case nope",
        "profile missing.yaml --out out",
        "prepare-data missing --out out",
        "verify-data missing",
        "evaluate --model missing --data missing --out out",
        "checkpoints missing",
        "status missing",
        "verify missing",
        "report missing",
        "show-batch missing 1",
        "finalize-masks missing",
        "score-units missing --method gradient --sparsity 0.5 --out out.json",
        "rule-masks dense --preset missing --window 8 --out out.json",
        "import-hf missing --out out",
        "export-hf missing --out out",
    ],
)
def test_refusals(command: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    code, said, loaded = answered(command.format(config=config).split(), tmp_path)
    assert (code, loaded) == (2, []), said
    assert said.startswith("error: ")


@pytest.mark.parametrize(
    "command", ["--help", "--version", "train --help", "plan {config}", "plan {config} --json"]
)
def test_answers(command: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / "qwen3_0p6b_learn.yaml"
    code, said, loaded = answered(command.format(config=config).split(), tmp_path)
    assert (code, loaded) == (0, []), said


def test_look_ups(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = str(finished("heads"))
    for command in (["checkpoints", run], ["status", run], ["status", run, "--json"]):
        code, said, loaded = answered(command, tmp_path)
        assert (code, loaded) == (0, []), said


def test_version() -> None:
    """`python -m megaconsa` is the command."""
    ended = subprocess.run(
        [sys.executable, "-m", "megaconsa", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    version = re.escape(megaconsa.__version__)
    assert re.fullmatch(rf"megaconsa {version}( \(commit \w+(\+changes)?\))?\n", ended.stdout)
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        commit = ended.stdout.split("commit ")[1].strip(")\n").removesuffix("+changes")
        assert head.stdout.startswith(commit)


def test_version_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megaconsa import version

    monkeypatch.setattr(version, "__file__", str(tmp_path / "megaconsa" / "version.py"))
    assert version.described() == megaconsa.__version__
