"""Heads are cut into runs of one kind."""

from __future__ import annotations

import pytest

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels.attention.head_runs import runs


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((9, FULL_WINDOW, 8, 12), [(None, 0, 4)]),
        ((3, 3, 3, 3), [(3, 0, 4)]),
        ((FULL_WINDOW, FULL_WINDOW, 3, 3), [(None, 0, 2), (3, 2, 4)]),
        ((3, FULL_WINDOW, 3, 5), [(3, 0, 1), (None, 1, 2), (3, 2, 3), (5, 3, 4)]),
    ],
)
def test_runs_are_as_long_as_they_can_be(
    windows: tuple[int, ...], expected: list[tuple[int | None, int, int]]
) -> None:
    found = list(runs(windows, 8, 2))
    assert [(run.window, run.kv.start, run.kv.stop) for run in found] == expected
    assert [(run.q.start, run.q.stop) for run in found] == [
        (2 * start, 2 * stop) for _, start, stop in expected
    ]
