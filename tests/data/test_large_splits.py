"""A split of a trillion tokens opens in seconds, with little memory, looking at no shard."""

from __future__ import annotations

import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megaconsa.data.dataset_info import INFO, DatasetInfo
from megaconsa.data.token_shards import TokenShards
from megaconsa.errors import InputError

SEQUENCE_LENGTH = 8192
ROWS = 2047
"""Rows of a shard of 64 MiB, with ids of four bytes."""
SHARDS = 10**12 // (ROWS * SEQUENCE_LENGTH) + 1
ROW_BYTES = 8 + 4 * (SEQUENCE_LENGTH + 1)


def record(number: int) -> dict[str, object]:
    """The record of a shard, as MDSWriter writes it."""
    return {
        "column_encodings": ["uint64", f"ndarray:uint32:{SEQUENCE_LENGTH + 1}"],
        "column_names": ["row_hash", "tokens"],
        "column_sizes": [8, ROW_BYTES - 8],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh3_64"],
        "raw_data": {
            "basename": f"shard.{number:05}.mds",
            "bytes": ROWS * ROW_BYTES + 4 * (ROWS + 2) + 300,
            "hashes": {"xxh3_64": f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"},
        },
        "samples": ROWS,
        "size_limit": 64 << 20,
        "version": 2,
        "zip_data": None,
    }


@pytest.fixture(scope="module")
def large(info: DatasetInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a trillion tokens. Its shards are links to nothing."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "train").mkdir()
    for number in range(SHARDS):
        (folder / "train" / f"shard.{number:05}.mds").symlink_to("nothing")
    index = {"version": 2, "shards": [record(number) for number in range(SHARDS)]}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    split = info.splits["train"].model_copy(update={"sequences": SHARDS * ROWS})
    changes = {
        "vocab_size": 151_936,
        "sequence_length": SEQUENCE_LENGTH,
        "splits": {"train": split},
    }
    (folder / INFO).write_text(info.model_copy(update=changes).model_dump_json())
    return folder


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def open_and_measure(folder: Path, results: Connection) -> None:
    """Sends the number of sequences, the seconds of processor time, and the bytes of memory."""
    # Forgets the peak of what the process did before.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    started = time.process_time()
    shards = TokenShards(folder, "train")
    results.send((len(shards), time.process_time() - started, peak_bytes() - before))


def test_a_trillion_tokens_open_quickly(large: Path) -> None:
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=open_and_measure, args=(large, there))
    process.start()
    sequences, seconds, memory = here.recv()
    process.join()
    print(f"{seconds:.2f} s, {memory / 1e6:.0f} MB")
    assert sequences * SEQUENCE_LENGTH >= 10**12
    assert seconds < 5
    assert memory < 200e6


def test_missing_shards_of_a_large_split_are_counted(large: Path) -> None:
    for number in (7, 50_000):
        (large / "train" / f"shard.{number:05}.mds").unlink()
    with pytest.raises(InputError, match=r"shard\.00007\.mds: shard, and 1 more, cannot be"):
        TokenShards(large, "train")
