"""Faults while data are read from an object store: retried, or ended with the address."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megaconsa import object_store, reading
from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.cache_space import PART
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.remote_cache import RemoteFolder
from megaconsa.data.token_shards import TokenShards
from megaconsa.errors import DataError, InputError, RunError, UnreachableError
from tests.support import object_stores
from tests.support.disks import fill
from tests.support.object_stores import ObjectStore, answers, halves, hangs_up, stalls
from tests.support.remote_data import NAME, cached, key, open_stream, read_all, tokens

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.mark.parametrize(
    "fault", [answers(500), answers(503), hangs_up, halves, stalls(0.6)], ids=lambda f: f.__name__
)
def test_a_store_that_fails_for_some_time(
    store: ObjectStore,
    address: Path,
    few_shards: Path,
    cache: CacheSettings,
    fault: object_stores.Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 30.0)
    # Some SDKs retry five times by themselves.
    repeat = 1 if fault.__name__ == "fault" else 7
    store.faults["dataset.json"] = [fault] * repeat
    store.faults[NAME] = [fault] * repeat
    assert np.array_equal(read_all(address, cache), read_all(few_shards, cache))
    assert not any(store.faults.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_stays_away(
    store: ObjectStore, address: Path, cache: CacheSettings, workers: int
) -> None:
    stream = open_stream(address, cache, workers)
    store.faults["*"] = [answers(503)] * 1000
    with pytest.raises(UnreachableError, match=r"s3://bucket/data/train/shard.*the same command"):
        tokens(stream)
    with pytest.raises(UnreachableError, match=r"s3://bucket/data/dataset.json could not be read"):
        DatasetInfo.load(address, CacheSettings(cache.folder / "other"))  # type: ignore[operator]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard(
    store: ObjectStore, own_address: Path, cache: CacheSettings, workers: int
) -> None:
    def flip(content: bytearray) -> bytearray:
        content[len(content) // 2] ^= 1
        return content

    store.change(key(own_address), flip)
    with pytest.raises(DataError, match=rf"^s3://.*{NAME}: shard does not match its xxh3_64 hash"):
        tokens(open_stream(own_address, cache, workers), 40)
    store.change(key(own_address), lambda content: content[:-5])
    store.gets.clear()
    with pytest.raises(DataError, match=rf"{NAME}: shard has \d+ bytes instead of \d+"):
        read_all(own_address, cache)
    assert store.gets[NAME] == 2
    assert NAME not in {file.name for file in cached(cache)}


def test_a_byte_that_flips_on_the_way_is_downloaded_again(
    store: ObjectStore, address: Path, few_shards: Path, cache: CacheSettings
) -> None:
    store.faults[NAME] = [lambda handler, body: body[:99] + b"\xff\x01" + body[101:]]
    assert np.array_equal(read_all(address, cache), read_all(few_shards, cache))
    assert store.gets[NAME] == 2


def test_a_copy_that_was_damaged_in_the_cache_is_replaced(
    store: ObjectStore, address: Path, few_shards: Path, cache: CacheSettings
) -> None:
    read_all(address, cache)
    (file,) = [file for file in cached(cache) if file.name == NAME]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert np.array_equal(read_all(address, cache), read_all(few_shards, cache))
    assert store.gets[NAME] == 2


def test_missing_files(store: ObjectStore, own_address: Path, cache: CacheSettings) -> None:
    store.client.delete_object(Bucket="bucket", Key=key(own_address))
    with pytest.raises(DataError, match=rf"{NAME}: shard is missing from its store"):
        read_all(own_address, cache)
    with pytest.raises(InputError, match=r"data s3://bucket/gone: it has no dataset.json; upload"):
        DatasetInfo.load(Path("s3://bucket/gone"), cache)
    with pytest.raises(InputError, match=r"data s3://nowhere/gone: it has no dataset.json"):
        DatasetInfo.load(Path("s3://nowhere/gone"), cache)


def test_refused_access(store: ObjectStore, address: Path, cache: CacheSettings) -> None:
    store.faults["*"] = [answers(403)] * 100
    with pytest.raises(InputError, match=r"s3://bucket/data/dataset.json: access is refused"):
        DatasetInfo.load(address, cache)


def test_no_credentials(
    store: ObjectStore, address: Path, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(InputError, match=r"s3://bucket/data/dataset.json: no credentials"):
        DatasetInfo.load(address, cache)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [
        ("s3", "boto3.s3.transfer", "boto3"),
        ("gs", "google.cloud.storage", "google-cloud-storage"),
        ("oci", "oci", "oci"),
        ("azure", "azure.storage.blob", "azure-storage-blob azure-identity"),
        ("hf", "huggingface_hub", "huggingface_hub"),
    ],
)
def test_a_missing_package_is_named(
    scheme: str,
    module: str,
    package: str,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{scheme}:// needs a package .* install {package}$"):
        DatasetInfo.load(Path(f"{scheme}://bucket/data/folder/x"), cache)


def test_a_process_that_is_killed_while_it_downloads(
    store: ObjectStore, address: Path, few_shards: Path, cache: CacheSettings
) -> None:
    store.faults[NAME] = [stalls(30)]
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(address, cache))
    process.start()
    while not store.gets[NAME]:
        time.sleep(0.01)
    (part,) = (cache.folder or Path()).glob(f"*/train/{NAME}{PART}")
    timer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
    timer.start()
    # Waits for the lock until then.
    assert np.array_equal(read_all(address, cache), read_all(few_shards, cache))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not part.exists()


def test_what_a_dead_process_left_makes_room(
    store: ObjectStore, address: Path, cache: CacheSettings
) -> None:
    local = RemoteFolder(address, cache).local
    left = local / "train" / f"shard.00000.mds{PART}"
    left.mkdir(parents=True)
    (left / "file.1234").write_bytes(bytes(1000))
    opened = TokenShards(address, "train", cache)
    opened[len(opened) - 1]
    assert not left.exists()


def test_no_other_file_is_removed(store: ObjectStore, address: Path, cache: CacheSettings) -> None:
    assert cache.folder is not None
    read_all(address, CacheSettings(cache.folder, 1 / 2**30))
    assert DatasetInfo.load(address, cache)
    assert store.gets["dataset.json"] == store.gets["index.json"] == 1


@pytest.mark.parametrize("disk", ["96k"], indirect=True)
def test_a_full_cache_disk(
    store: ObjectStore, address: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheSettings(disk / "cache")
    opened = TokenShards(address, "train", cache)
    fill(disk)
    with pytest.raises(
        RunError, match=r"^data.cache=.*shard.*could not be written \(No space left.*make room"
    ):
        opened.rows(np.arange(len(opened)))
    (disk / "filler").unlink()
    assert opened[0].size
