"""SIGKILL loses nothing and changes nothing.

This is a tenth of what `python -m tests.support.kill_trials` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.kill_trials import forced_moments, random_trials

pytestmark = pytest.mark.slow


def test_killed_at_random_moments(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert random_trials(make_config(), tmp_path, trials=10, seed=1) == 0


def test_killed_at_every_moment_of_a_save(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert forced_moments(make_config(), tmp_path) == 0
