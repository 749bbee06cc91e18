"""A data folder in an object store: the same rows, one download a node, a bounded cache."""

from __future__ import annotations

import logging
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megaconsa import reading
from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.cache_space import PART
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.mixture_file import tokenizer_folder
from megaconsa.data.shards import verify
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from tests.support.object_stores import ObjectStore, answers
from tests.support.remote_data import NAME, cached, open_stream, read_all, tokens, wait_for

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_the_same_rows_as_from_the_local_folder(
    store: ObjectStore,
    address: Path,
    few_shards: Path,
    cache: CacheSettings,
    workers: int,
    shuffle_shards: int,
) -> None:
    remote = open_stream(address, cache, workers, shuffle_shards=shuffle_shards)
    local = open_stream(few_shards, cache, shuffle_shards=shuffle_shards)
    assert np.array_equal(tokens(remote), tokens(local))
    validation = open_stream(address, cache, split="validation").fixed_batches(16)
    expected = open_stream(few_shards, cache, split="validation").fixed_batches(16)
    assert np.array_equal(validation[0].tokens, expected[0].tokens)
    assert not list(cached(cache)[0].parent.glob(f"*{PART}"))


def test_descriptions_and_tokenizer(store: ObjectStore, address: Path, few_shards: Path) -> None:
    assert DatasetInfo.load(address) == DatasetInfo.load(few_shards)
    fingerprint = Tokenizer.load(tokenizer_folder(address)).fingerprint
    assert fingerprint == DatasetInfo.load(few_shards).tokenizer_fingerprint
    assert verify(address) == []


def test_messages_name_the_address(store: ObjectStore, address: Path, cache: CacheSettings) -> None:
    stream = open_stream(address, cache)
    assert str(stream.path) == "s3://bucket/data"
    assert str(stream.files(np.array([0]))[0]).startswith("s3://bucket/data/train/shard.")


def test_a_mixture_of_a_local_and_a_remote_folder(
    store: ObjectStore, address: Path, few_shards: Path, cache: CacheSettings, tmp_path: Path
) -> None:
    def mixture(name: str, first: str) -> Path:
        sources = {
            "one": {"path": first, "weight": 0.5},
            "two": {"path": str(few_shards), "weight": 0.5},
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"sources": sources}))
        return file

    remote = open_stream(mixture("remote", "s3://bucket/data"), cache, shuffle_shards=2)
    local = open_stream(mixture("local", str(few_shards)), cache, shuffle_shards=2)
    assert remote.info.identity() == local.info.identity()
    assert np.array_equal(tokens(remote), tokens(local))


def test_processes_of_a_node_download_each_file_once(
    store: ObjectStore, address: Path, few_shards: Path, cache: CacheSettings
) -> None:
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    expected = read_all(few_shards, cache)

    def read() -> None:
        begin.wait()
        assert np.array_equal(read_all(address, cache), expected)

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    shards = len(list((few_shards / "train").glob("*.mds")))
    assert store.gets == {
        "dataset.json": 1,
        "index.json": 1,
        **{f"shard.{number:05}.mds": 1 for number in range(shards)},
    }


def test_the_cache_keeps_its_limit_and_the_shards_that_were_used_last(
    store: ObjectStore, address: Path, few_shards: Path, tmp_path: Path
) -> None:
    size = max(file.stat().st_size for file in (few_shards / "train").glob("*.mds"))
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
    few_shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = max(file.stat().st_size for file in (few_shards / "train").glob("*.mds"))
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
    store: ObjectStore, address: Path, few_shards: Path, tmp_path: Path
) -> None:
    size = max(file.stat().st_size for file in (few_shards / "train").glob("*.mds"))
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
    few_shards: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 30.0)
    stream = open_stream(address, cache, shuffle_shards=2)
    store.faults["*"] = [answers(503)] * 4
    local = open_stream(few_shards, cache, shuffle_shards=2)
    assert np.array_equal(tokens(stream), tokens(local))
