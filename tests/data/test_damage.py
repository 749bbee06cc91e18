"""Damage to a data folder is found when the folder is opened, read or verified.

The message names the damaged file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from megaconsa import reading
from megaconsa.data import shards
from megaconsa.data.shards import INFO, DataError, DatasetInfo, verify
from megaconsa.data.stream import BatchStream, TokenShards
from megaconsa.errors import InputError, UnreachableError
from megaconsa.tools import verify_data
from tests.support.disks import OUT_OF_REACH

NAME = "shard.00003.mds.zstd"


def shard(folder: Path) -> Path:
    return folder / "train" / NAME


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def edit_index(folder: Path, edit: Callable[[list[dict]], object]) -> None:
    file = folder / "train" / "index.json"
    index = json.loads(file.read_text())
    edit(index["shards"])
    file.write_text(json.dumps(index))


def open_stream(folder: Path, workers: int = 0) -> BatchStream:
    return BatchStream(folder, seed=0, global_batch=8, micro_batch=8, workers=workers)


def read_epoch(stream: BatchStream) -> None:
    steps = stream.steps()
    for _ in range(len(stream.shards) // 8):
        next(steps)


def test_intact_data_verifies(prepared: Path) -> None:
    assert verify(prepared) == []


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_missing_or_truncated_shard_at_open(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(shard(copy))
    with pytest.raises(InputError, match=NAME):
        TokenShards(copy, "train")
    (fault,) = verify(copy)
    assert NAME in fault


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_at_read(copy: Path, damage: Callable[[Path], None], workers: int) -> None:
    stream = open_stream(copy, workers)
    damage(shard(copy))
    with pytest.raises(DataError, match=NAME):
        read_epoch(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_out_of_reach_is_waited_for(
    copy: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    stream = open_stream(copy, workers)
    steps = len(stream.shards) // 8
    expected = [batch.tokens for step in islice(open_stream(copy).steps(), steps) for batch in step]
    aside = shard(copy).rename(copy / "aside")
    shard(copy).symlink_to(OUT_OF_REACH)
    threading.Timer(1.0, lambda: aside.replace(shard(copy))).start()
    found = [batch.tokens for step in islice(stream.steps(), steps) for batch in step]
    for tokens, others in zip(found, expected, strict=True):
        assert torch.equal(tokens, others)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_stays_out_of_reach_is_no_damage(
    copy: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.5)
    stream = open_stream(copy, workers)
    shard(copy).unlink()
    shard(copy).symlink_to(OUT_OF_REACH)
    with pytest.raises(UnreachableError, match=NAME):
        read_epoch(stream)


def test_a_shard_is_read_twice_before_it_counts_as_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "logger", _Repairing(shard(copy)))
    stream = open_stream(copy)
    flip(shard(copy))
    read_epoch(stream)


class _Repairing:
    """Replaces the logger and repairs a file between its two reads.

    The stream logs a warning between the two reads.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def warning(self, *said: object) -> None:
        flip(self.file)


def test_flipped_byte_is_found_by_verify(copy: Path) -> None:
    flip(shard(copy))
    flip(copy / "validation" / "shard.00000.mds.zstd")
    faults = verify(copy)
    assert len(faults) == 2
    assert str(shard(copy)) in faults[0]
    assert "validation" in faults[1]


def test_wrong_decompressed_hash_is_found(copy: Path) -> None:
    edit_index(copy, lambda shards: shards[3]["raw_data"]["hashes"].update(xxh3_64="0" * 16))
    with pytest.raises(DataError, match=f"{NAME}: decompressed shard does not match"):
        read_epoch(open_stream(copy))
    (fault,) = verify(copy)
    assert NAME in fault


def test_fewer_sequences_than_promised(copy: Path) -> None:
    edit_index(copy, lambda shards: shards.pop())
    with pytest.raises(
        InputError, match=r"index\.json: it counts \d+ sequences but dataset\.json promises"
    ):
        TokenShards(copy, "train")
    (fault,) = verify(copy)
    assert "promises" in fault


def test_other_columns_are_refused(copy: Path) -> None:
    edit_index(copy, lambda shards: shards[3].update(column_encodings=["pkl"]))
    with pytest.raises(InputError, match=f"{NAME} holds .*pkl"):
        TokenShards(copy, "train")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"shards": [{}]}', '{"shards": [3]}'])
def test_broken_index_is_refused(copy: Path, content: str) -> None:
    (copy / "train" / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        TokenShards(copy, "train")


def test_missing_hash_is_refused(copy: Path) -> None:
    edit_index(copy, lambda shards: shards[3]["raw_data"]["hashes"].clear())
    with pytest.raises(InputError, match="no xxh3_64 hash"):
        TokenShards(copy, "train")


def test_ids_beyond_the_vocabulary_and_other_tokenizer(copy: Path, info: DatasetInfo) -> None:
    small = info.model_copy(update={"vocab_size": 400, "tokenizer_fingerprint": "0" * 16})
    (copy / INFO).write_text(small.model_dump_json())
    faults = verify(copy)
    assert "fingerprint" in faults[0]
    assert all("token id" in fault and "shard." in fault for fault in faults[1:])
    assert len(faults) > 5


def test_read_only_folder_is_left_as_it_is(copy: Path) -> None:
    before = sorted((file, file.stat().st_mtime_ns) for file in copy.rglob("*"))
    read_epoch(open_stream(copy, workers=2))
    verify(copy)
    assert sorted((file, file.stat().st_mtime_ns) for file in copy.rglob("*")) == before


def test_tool_ends_with_1_on_damage(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_data.main(copy)
    assert "all shards are intact" in capsys.readouterr().out
    flip(shard(copy))
    with pytest.raises(typer.Exit) as exit_:
        verify_data.main(copy)
    assert exit_.value.exit_code == 1
    assert NAME in capsys.readouterr().err


def test_samples_are_copies(prepared: Path) -> None:
    """Decoded arrays are views of the shard in memory. Batches must not be."""
    stream = open_stream(prepared)
    first = next(stream.steps())[0]
    kept = first.tokens.clone()
    first.tokens.zero_()
    assert np.array_equal(next(stream.steps())[0].tokens, kept)


@pytest.mark.parametrize("name", ["../shard.00003.mds.zstd", "/etc/hostname", ".."])
def test_an_index_names_files_of_its_own_folder_only(copy: Path, name: str) -> None:
    edit_index(copy, lambda shards: shards[3]["zip_data"].update(basename=name))
    with pytest.raises(InputError, match=r"index\.json: .* no file of its folder"):
        TokenShards(copy, "train")
