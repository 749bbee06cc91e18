"""A new user's first hour: see the package's docstring."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaconsa import cli
from tests.journey.chapters import travel
from tests.journey.walk import Walk

COMMANDS = {
    command.name or command.callback.__name__
    for command in cli.app.registered_commands
    if command.callback is not None
}


@pytest.mark.slow
def test_a_new_user_walks_through_every_command(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    try:
        travel(walk)
    finally:
        print(walk.listing())
    assert walk.commands() >= COMMANDS
