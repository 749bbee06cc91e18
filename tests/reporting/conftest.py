"""The configuration file that the tests of the command plan change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.plans import SETTINGS


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """The file of a run configuration for the command plan."""
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    return path
