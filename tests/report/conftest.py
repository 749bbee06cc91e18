"""Runs to report on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.made_runs import write_runs


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like runs/quickstart. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_runs(folder)
    return folder
