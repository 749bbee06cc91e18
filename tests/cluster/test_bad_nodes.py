"""Which nodes are suspects after a failed start."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megaconsa.cluster.bad_nodes import suspects

HEAD = "2026-11-27 16:00:09 +0000  rank 0 of 2 on node7, pid 41, in step 8, exit code 76\n"
LOST = HEAD + "error: rank 1 of 2 on node8 died without a word: killed from outside (kill -9)\n"
BROKEN = (
    HEAD + "Traceback\ntorch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n"
)
DIVERGED = HEAD + "error: the loss is not finite\n"
HUNG = HEAD + "error: nothing has moved for 600 s\n"


def failed(run: Path, start: str, said: str) -> None:
    folder = run / "failures" / start
    folder.mkdir(parents=True)
    (folder / "first.txt").write_text(said)


@pytest.mark.parametrize(
    ("said", "expected"),
    [(LOST, ["node8"]), (BROKEN, ["node7"]), (DIVERGED, []), (HUNG, []), ("", [])],
    ids=["lost", "broken", "diverged", "hung", "empty"],
)
def test_suspects(said: str, expected: list[str], tmp_path: Path) -> None:
    assert suspects(tmp_path, None) == []
    failed(tmp_path, "20261127T160000", said)
    assert suspects(tmp_path, None) == expected


def test_only_the_newest_start_counts(tmp_path: Path) -> None:
    failed(tmp_path, "20261127T160000", LOST)
    assert suspects(tmp_path, datetime(2026, 11, 27, 15, 0)) == ["node8"]
    assert suspects(tmp_path, datetime(2026, 11, 27, 17, 0)) == []
    failed(tmp_path, "20261127T180000", DIVERGED)
    assert suspects(tmp_path, datetime(2026, 11, 27, 17, 0)) == []
