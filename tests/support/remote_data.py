"""Reading a data folder in an object store."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards

NAME = "shard.00003.mds"


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


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
