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
from megaconsa.data import shard_file
from megaconsa.data.dataset_info import INFO, DatasetInfo
from megaconsa.data.shards import verify
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards
from megaconsa.errors import DataError, InputError, UnreachableError
from megaconsa.tools import verify_data
from tests.support.disks import OUT_OF_REACH

NAME = "shard.00003.mds"


def shard(folder: Path) -> Path:
    """The file of the shard."""
    suffix = ".zstd" if DatasetInfo.load(folder).compressed else ""
    return folder / "train" / (NAME + suffix)


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


def test_missing_shards_at_open(either: Path) -> None:
    shard(either).unlink()
    with pytest.raises(InputError, match=f"{NAME}.*: shard cannot be found, restore the file"):
        TokenShards(either, "train")
    (fault,) = verify(either)
    assert NAME in fault
    for other in (either / "train").glob("shard.0000[12].*"):
        other.unlink()
    with pytest.raises(InputError, match=r"shard.00001.mds.*: shard, and 2 more, cannot be"):
        TokenShards(either, "train")


def test_truncated_shard_at_its_first_row(either: Path) -> None:
    """The rows before the missing end are intact."""
    truncate(shard(either))
    stream = open_stream(either)
    size = shard(either).stat().st_size
    with pytest.raises(DataError, match=rf"{NAME}.*: shard has {size} bytes instead of {size + 1}"):
        stream.shards[int(stream.shards._split.ends[2])]
    (fault,) = verify(either)
    assert f"{size} bytes instead of {size + 1}" in fault


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_at_read(either: Path, damage: Callable[[Path], None], workers: int) -> None:
    stream = open_stream(either, workers)
    damage(shard(either))
    with pytest.raises(DataError, match=NAME):
        read_epoch(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_out_of_reach_is_waited_for(
    either: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    stream = open_stream(either, workers)
    steps = len(stream.shards) // 8
    undisturbed = islice(open_stream(either).steps(), steps)
    expected = [batch.tokens for step in undisturbed for batch in step]
    aside = shard(either).rename(either / "aside")
    shard(either).symlink_to(OUT_OF_REACH)
    threading.Timer(1.0, lambda: aside.replace(shard(either))).start()
    found = [batch.tokens for step in islice(stream.steps(), steps) for batch in step]
    for tokens, others in zip(found, expected, strict=True):
        assert torch.equal(tokens, others)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_stays_out_of_reach_is_no_damage(
    either: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.5)
    stream = open_stream(either, workers)
    shard(either).unlink()
    shard(either).symlink_to(OUT_OF_REACH)
    with pytest.raises(UnreachableError, match=NAME):
        read_epoch(stream)


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_shard_is_read_twice_before_it_counts_as_damaged(
    either: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    repairing = _Repairing(shard(either))
    monkeypatch.setattr(shard_file, "logger", repairing)
    stream = open_stream(either)
    damage(shard(either))
    read_epoch(stream)
    assert repairing.said == 1
    damage(shard(either))
    assert verify(either) == []
    assert repairing.said == 2


class _Repairing:
    """Replaces the logger and repairs a file between its two reads.

    A warning is logged between the two reads.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.intact = file.read_bytes()
        self.said = 0

    def warning(self, *said: object) -> None:
        self.file.write_bytes(self.intact)
        self.said += 1


def test_flipped_byte_is_found_by_verify(either: Path) -> None:
    flip(shard(either))
    (other,) = (either / "validation").glob("shard.00000.*")
    flip(other)
    faults = verify(either)
    assert len(faults) == 2
    assert str(shard(either)) in faults[0]
    assert "validation" in faults[1]


def test_wrong_decompressed_hash_is_found(compressed: Path) -> None:
    edit_index(compressed, lambda shards: shards[3]["raw_data"]["hashes"].update(xxh3_64="0" * 16))
    with pytest.raises(DataError, match=f"{NAME}.*: decompressed shard does not match"):
        read_epoch(open_stream(compressed))
    (fault,) = verify(compressed)
    assert NAME in fault


def test_fewer_sequences_than_promised(either: Path) -> None:
    edit_index(either, lambda shards: shards.pop())
    with pytest.raises(
        InputError, match=r"index\.json: it counts \d+ sequences but dataset\.json promises"
    ):
        TokenShards(either, "train")
    (fault,) = verify(either)
    assert "promises" in fault


def test_other_columns_are_refused(either: Path) -> None:
    edit_index(either, lambda shards: shards[3].update(column_encodings=["pkl"]))
    with pytest.raises(InputError, match=f"{NAME}.* holds .*pkl"):
        TokenShards(either, "train")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"shards": [{}]}', '{"shards": [3]}'])
def test_broken_index_is_refused(either: Path, content: str) -> None:
    (either / "train" / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        TokenShards(either, "train")


def test_missing_hash_is_refused(either: Path) -> None:
    edit_index(either, lambda shards: shards[3]["raw_data"]["hashes"].clear())
    with pytest.raises(InputError, match="no xxh3_64 hash"):
        TokenShards(either, "train")


def test_more_rows_than_the_file_can_hold_are_refused(copy: Path) -> None:
    edit_index(copy, lambda shards: shards[3].update(samples=10**6))
    with pytest.raises(InputError, match=f"{NAME} has .* bytes, too few for 1000000 rows"):
        TokenShards(copy, "train")


def test_ids_beyond_the_vocabulary_and_other_tokenizer(either: Path) -> None:
    info = DatasetInfo.load(either)
    small = info.model_copy(update={"vocab_size": 400, "tokenizer_fingerprint": "0" * 16})
    (either / INFO).write_text(small.model_dump_json())
    faults = verify(either)
    assert "fingerprint" in faults[0]
    assert all("token id" in fault and "shard." in fault for fault in faults[1:])
    assert len(faults) > 5


def test_read_only_folder_is_left_as_it_is(either: Path) -> None:
    before = sorted((file, file.stat().st_mtime_ns) for file in either.rglob("*"))
    read_epoch(open_stream(either, workers=2))
    verify(either)
    assert sorted((file, file.stat().st_mtime_ns) for file in either.rglob("*")) == before


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


@pytest.mark.parametrize("name", ["../shard.00003.mds", "/etc/hostname", ".."])
def test_an_index_names_files_of_its_own_folder_only(either: Path, name: str) -> None:
    stored = "zip_data" if DatasetInfo.load(either).compressed else "raw_data"
    edit_index(either, lambda shards: shards[3][stored].update(basename=name))
    with pytest.raises(InputError, match=r"index\.json: .* no file of its folder"):
        TokenShards(either, "train")


def test_rows_in_the_wrong_place_are_found(copy: Path) -> None:
    """Two shards are swapped. Each is intact, and both have the same size."""
    one, two = (copy / "train" / f"shard.0000{number}.mds" for number in (3, 4))
    assert one.stat().st_size == two.stat().st_size
    aside = one.rename(copy / "aside")
    two.rename(one)
    aside.rename(two)
    with pytest.raises(DataError, match=r"shard.0000[34].mds: row \d+ does not match its hash"):
        read_epoch(open_stream(copy))
    faults = verify(copy)
    assert len(faults) == 2


def test_every_flipped_byte_of_a_row_is_found(copy: Path) -> None:
    file = shard(copy)
    split = open_stream(copy).shards._split
    flat = split.shard(3)
    intact = np.empty(33, np.uint16)
    row = np.empty(33, np.uint16)
    flat.read(5, intact)
    width = intact.nbytes + 8
    begin = file.stat().st_size - (int(split.sizes[3]) - 5) * width
    content = bytearray(file.read_bytes())
    for place in range(begin, begin + width):
        content[place] ^= 64
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{NAME}: row 5 does not match"):
            flat.read(5, row)
        content[place] ^= 64
    file.write_bytes(content)
    flat.read(5, row)
    assert np.array_equal(row, intact)
