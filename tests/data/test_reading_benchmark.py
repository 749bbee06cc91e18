"""The benchmark of reading compares equal rows and counts the tokens of all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaconsa.benchmarks import reading

LENGTH = 64


@pytest.mark.parametrize("vocab_size", [500, 100_000])
def test_speeds_of_readers_and_ranks(
    vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "ROUNDS", 2)
    monkeypatch.setattr(reading, "RANK_SECONDS", 0.05)
    tokens = reading.draw(LENGTH * 100 + 1, vocab_size)
    for each in (reading.Megaconsa, reading.Memmap):
        (tmp_path / each.name).mkdir()
        each.write(tmp_path / each.name, tokens, LENGTH, vocab_size)
    speeds = reading.readers_speed(tmp_path, tokens, LENGTH)
    assert speeds.keys() == {"megaconsa", "memmap"}
    assert min(speeds.values()) > 0
    assert reading.node_speed(tmp_path / "megaconsa", ranks=2) > 0


def test_other_rows_are_no_result(tmp_path: Path) -> None:
    tokens = reading.draw(LENGTH * 100 + 1, 500)
    (tmp_path / "memmap").mkdir()
    reading.Memmap.write(tmp_path / "memmap", np.roll(tokens, 1), LENGTH, 500)
    with pytest.raises(AssertionError, match="memmap"):
        reading.readers_speed(tmp_path, tokens, LENGTH)
