"""Every command explains itself at once, by its name and by its script."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from megaconsa import cli
from tests.support import ROOT

COMMANDS = {
    command.name or command.callback.__name__: command.callback.__module__
    for command in cli.app.registered_commands
    if command.callback is not None
}
TOOLS = sorted(name for name in COMMANDS if name != "train")
HEAVY = ("torch", "numpy", "transformers", "deepspeed", "streaming", "matplotlib", "pydantic")


def test_every_tool_is_a_command() -> None:
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    modules = {COMMANDS[name].removeprefix("megaconsa.tools.") for name in TOOLS}
    assert modules == scripts
    names = {name.replace("-", "_") for name in TOOLS}
    assert modules - names == {"evaluate_models", "profile_training"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, done: Callable[..., str]) -> None:
    text = done(command, "--help")
    assert "Example" in text
    assert f"megaconsa {command} " in text or f"megaconsa {command}\n" in text.replace(" \n", "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_default_is_the_working_directory(command: str) -> None:
    """An empty path is shown as `.`, which no command means."""
    group: Any = typer.main.get_command(cli.app)
    parameters = group.commands[command].params
    assert [each.name for each in parameters if each.default == Path()] == []


def test_the_commands_are_listed_with_a_sentence_each(done: Callable[..., str]) -> None:
    text = done("--help")
    for command in COMMANDS:
        assert any(line.strip("│ ").startswith(f"{command} ") for line in text.splitlines())


def test_no_arguments_shows_the_commands(megaconsa: Callable[..., Any]) -> None:
    outcome = megaconsa()
    assert outcome.code == 2
    assert "finalize-masks" in outcome.out + outcome.err


def test_the_command_line_loads_nothing_heavy() -> None:
    """--help and refusals of arguments must answer at once."""
    script = (
        "import json, sys; import megaconsa.cli; "
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_script_of_a_tool_is_the_same_command(tool: str, tmp_path: Path) -> None:
    """The script runs from another folder."""
    script = ROOT / "tools" / f"{COMMANDS[tool].rpartition('.')[2]}.py"
    ended = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Example" in ended.stdout


def test_script_of_a_tool_does_the_work(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """The script's own folder comes first in sys.path.

    Its neighbours must not hide modules that libraries import.
    """
    script = ROOT / "tools" / "finalize_masks.py"
    command: list[str | Path] = [
        sys.executable,
        script,
        finished("heads"),
        "--out",
        tmp_path / "allocation.json",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "allocation.json").is_file()
