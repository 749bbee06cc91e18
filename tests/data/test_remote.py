"""A data folder in an object store: the same rows, one download a node, a bounded cache, faults."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megaconsa import reading
from megaconsa.data import object_store, shards
from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.cache_space import PART
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.mixture_file import tokenizer_folder
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.remote_cache import RemoteFolder
from megaconsa.data.shards import verify
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import DataError, InputError, RunError, UnreachableError
from tests.support import object_stores
from tests.support.disks import fill
from tests.support.object_stores import ObjectStore, answers, halves, hangs_up, stalls

NAME = "shard.00003.mds"
pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_stores.object_store() as store:
        yield store


@pytest.fixture
def store(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """The server, without faults and with its requests forgotten."""
    server.use(monkeypatch, tmp_path)
    yield server
    server.faults.clear()


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(tmp_path / "cache")


@pytest.fixture(scope="module")
def prepared(
    text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data folder of a few shards."""
    folder = tmp_path_factory.mktemp("remote") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1 << 14)
        prepare(
            [str(text_folder)],
            folder,
            Options(sequence_length=32, validation_share=0.1),
            tokenizer=tokenizer_folder,
        )
    assert 5 < len(list((folder / "train").glob("shard.*"))) < 15
    return folder


@pytest.fixture(scope="module")
def address(server: ObjectStore, prepared: Path) -> Path:
    return Path(server.upload(prepared, "data"))


@pytest.fixture
def own_address(store: ObjectStore, prepared: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(store.upload(prepared, tmp_path.name))


def key(address: Path, name: str = NAME) -> str:
    return f"{address.name}/train/{name}"


def open_stream(path: Path, cache: CacheSettings, workers: int = 0, **options: Any) -> BatchStream:
    settings: dict[str, Any] = {"seed": 0, "global_batch": 8, "micro_batch": 8} | options
    return BatchStream(path, workers=workers, cache=cache, **settings)


def tokens(stream: BatchStream, steps: int = 20, taken: int = 0) -> np.ndarray:
    found = [batch.tokens.numpy() for step in islice(stream.steps(taken), steps) for batch in step]
    return np.concatenate(found)


def cached(cache: CacheSettings) -> list[Path]:
    assert cache.folder is not None
    return sorted(cache.folder.glob("*/*/*.mds"))


def read_all(path: Path, cache: CacheSettings) -> np.ndarray:
    opened = TokenShards(path, "train", cache)
    return opened.rows(np.arange(len(opened)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_the_same_rows_as_from_the_local_folder(
    store: ObjectStore,
    address: Path,
    prepared: Path,
    cache: CacheSettings,
    workers: int,
    shuffle_shards: int,
) -> None:
    remote = open_stream(address, cache, workers, shuffle_shards=shuffle_shards)
    local = open_stream(prepared, cache, shuffle_shards=shuffle_shards)
    assert np.array_equal(tokens(remote), tokens(local))
    validation = open_stream(address, cache, split="validation").fixed_batches(16)
    expected = open_stream(prepared, cache, split="validation").fixed_batches(16)
    assert np.array_equal(validation[0].tokens, expected[0].tokens)
    assert not list(cached(cache)[0].parent.glob(f"*{PART}"))


def test_descriptions_and_tokenizer(store: ObjectStore, address: Path, prepared: Path) -> None:
    assert DatasetInfo.load(address) == DatasetInfo.load(prepared)
    fingerprint = Tokenizer.load(tokenizer_folder(address)).fingerprint
    assert fingerprint == DatasetInfo.load(prepared).tokenizer_fingerprint
    assert verify(address) == []


def test_messages_name_the_address(store: ObjectStore, address: Path, cache: CacheSettings) -> None:
    stream = open_stream(address, cache)
    assert str(stream.path) == "s3://bucket/data"
    assert str(stream.files(np.array([0]))[0]).startswith("s3://bucket/data/train/shard.")


def test_a_mixture_of_a_local_and_a_remote_folder(
    store: ObjectStore, address: Path, prepared: Path, cache: CacheSettings, tmp_path: Path
) -> None:
    def mixture(name: str, first: str) -> Path:
        sources = {
            "one": {"path": first, "weight": 0.5},
            "two": {"path": str(prepared), "weight": 0.5},
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"sources": sources}))
        return file

    remote = open_stream(mixture("remote", "s3://bucket/data"), cache, shuffle_shards=2)
    local = open_stream(mixture("local", str(prepared)), cache, shuffle_shards=2)
    assert remote.info.identity() == local.info.identity()
    assert np.array_equal(tokens(remote), tokens(local))


def test_processes_of_a_node_download_each_file_once(
    store: ObjectStore, address: Path, prepared: Path, cache: CacheSettings
) -> None:
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    expected = read_all(prepared, cache)

    def read() -> None:
        begin.wait()
        assert np.array_equal(read_all(address, cache), expected)

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    shards = len(list((prepared / "train").glob("*.mds")))
    assert store.gets == {
        "dataset.json": 1,
        "index.json": 1,
        **{f"shard.{number:05}.mds": 1 for number in range(shards)},
    }


def test_the_cache_keeps_its_limit_and_the_shards_that_were_used_last(
    store: ObjectStore, address: Path, prepared: Path, tmp_path: Path
) -> None:
    size = max(file.stat().st_size for file in (prepared / "train").glob("*.mds"))
    cache = CacheSettings(tmp_path / "cache", 4.5 * size / 2**30)
    opened = TokenShards(address, "train", cache)
    firsts = opened._split.begins.tolist()
    for number in (0, 1, 2, 3):
        opened[firsts[number]]
        time.sleep(0.01)
    assert len(cached(cache)) == 4
    opened[firsts[0]]
    opened[firsts[4]]
    names = {file.name for file in cached(cache)}
    assert names == {f"shard.0000{number}.mds" for number in (0, 2, 3, 4)}
    read_all(address, cache)
    assert sum(file.stat().st_size for file in cached(cache)) <= cache.limit


def test_a_shard_in_use_stays(
    store: ObjectStore,
    address: Path,
    prepared: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = max(file.stat().st_size for file in (prepared / "train").glob("*.mds"))
    cache = CacheSettings(tmp_path / "cache", 2.5 * size / 2**30)
    mine = TokenShards(address, "train", cache)
    kept = mine[0]
    others = TokenShards(address, "train", cache)
    with caplog.at_level(logging.WARNING):
        others.rows(np.arange(len(others)))
    assert NAME.replace("3", "0") in {file.name for file in cached(cache)}
    assert "too small" not in caplog.text
    # Even an unlinked file stays readable.
    for file in cached(cache):
        file.unlink()
    assert np.array_equal(mine[0], kept)


def test_a_limit_below_what_is_in_use_is_said(
    store: ObjectStore, address: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CacheSettings(tmp_path / "cache", 1 / 2**30)
    with caplog.at_level(logging.WARNING):
        read_all(address, cache)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("data.cache_gib: the limit of 1 B is too small")


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_window_is_downloaded_ahead(
    store: ObjectStore, address: Path, cache: CacheSettings, workers: int
) -> None:
    stream = open_stream(address, cache, workers, shuffle_shards=2, micro_batch=2, global_batch=2)
    steps = stream.steps()
    next(steps)
    now, following = stream.order.ahead(0)
    expected = {stream.shards.locate(int(i))[0].name for i in [*now, *following]}
    wait_for(lambda: {file.name for file in cached(cache)} == expected)
    place = 2
    while set(stream.order.ahead(place)[0]) == set(now):
        next(steps)
        place += 2
    # The window has ended, and the one after the next is downloaded.
    last = {stream.shards.locate(int(i))[0].name for i in stream.order.ahead(place)[1]}
    next(steps)
    wait_for(lambda: last <= {file.name for file in cached(cache)})
    steps.close()
    assert max(store.gets.values()) == 1


def test_a_stream_without_prefetching_downloads_what_it_reads(
    store: ObjectStore, address: Path, cache: CacheSettings
) -> None:
    stream = open_stream(address, cache, shuffle_shards=3, prefetches=False)
    next(stream.steps())
    read = stream.files(np.arange(8))
    assert {file.name for file in cached(cache)} == {file.name for file in read}


def test_what_is_downloaded_ahead_fits_into_the_cache(
    store: ObjectStore, address: Path, prepared: Path, tmp_path: Path
) -> None:
    size = max(file.stat().st_size for file in (prepared / "train").glob("*.mds"))
    cache = CacheSettings(tmp_path / "cache", 3.5 * size / 2**30)
    stream = open_stream(address, cache, shuffle_shards=2, micro_batch=2, global_batch=2)
    steps = stream.steps()
    next(steps)
    now, following = stream.order.ahead(0)
    wanted = [stream.shards.locate(int(i))[0].name for i in [*now, *following]]
    wait_for(lambda: {file.name for file in cached(cache)} == set(wanted[:3]))
    time.sleep(0.2)
    assert {file.name for file in cached(cache)} == set(wanted[:3])
    steps.close()


def test_a_failure_ahead_of_need_is_not_the_runs(
    store: ObjectStore,
    address: Path,
    prepared: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 30.0)
    stream = open_stream(address, cache, shuffle_shards=2)
    store.faults["*"] = [answers(503)] * 4
    local = open_stream(prepared, cache, shuffle_shards=2)
    assert np.array_equal(tokens(stream), tokens(local))


@pytest.mark.parametrize(
    "fault", [answers(500), answers(503), hangs_up, halves, stalls(0.6)], ids=lambda f: f.__name__
)
def test_a_store_that_fails_for_some_time(
    store: ObjectStore,
    address: Path,
    prepared: Path,
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
    assert np.array_equal(read_all(address, cache), read_all(prepared, cache))
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
    with pytest.raises(DataError, match=rf"{NAME}: shard has \d+ bytes instead of \d+"):
        read_all(own_address, cache)
    assert NAME not in {file.name for file in cached(cache)}


def test_a_byte_that_flips_on_the_way_is_downloaded_again(
    store: ObjectStore, address: Path, prepared: Path, cache: CacheSettings
) -> None:
    store.faults[NAME] = [lambda handler, body: body[:99] + b"\xff\x01" + body[101:]]
    assert np.array_equal(read_all(address, cache), read_all(prepared, cache))
    assert store.gets[NAME] == 2


def test_a_copy_that_was_damaged_in_the_cache_is_replaced(
    store: ObjectStore, address: Path, prepared: Path, cache: CacheSettings
) -> None:
    read_all(address, cache)
    (file,) = [file for file in cached(cache) if file.name == NAME]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert np.array_equal(read_all(address, cache), read_all(prepared, cache))
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
    store: ObjectStore, address: Path, prepared: Path, cache: CacheSettings
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
    assert np.array_equal(read_all(address, cache), read_all(prepared, cache))
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
