"""A run on data in an object store trains as one on the same folder on a disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.checkpoint import store as checkpoints
from megaconsa.errors import InputError
from megaconsa.reporting.metrics import computed
from megaconsa.training.step_batch import step_batch
from tests.support import object_stores
from tests.support.object_stores import ObjectStore

MakeConfig = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
RULE = {"source": "rule", "rule": "dense"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    with object_stores.object_store() as found:
        found.use(monkeypatch, tmp_path)
        yield found


def test_it_trains_and_resumes_alike(
    store: ObjectStore,
    small_data: Path,
    make_config: MakeConfig,
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = store.upload(small_data, "python")

    def values(name: str, **data: Any) -> dict[str, Any]:
        return make_config(
            run={"dir": str(tmp_path / name)},
            allocation=RULE,
            training={"steps": 4},
            data=data,
        )

    expected = train(values("local", shuffle_shards=64))
    with caplog.at_level(logging.INFO, logger="megaconsa"):
        found = train(values("remote", path=address, cache=str(tmp_path / "cache")))
    assert computed(found) == computed(expected)
    recorded = yaml.safe_load((tmp_path / "remote" / "config.yaml").read_text())["data"]
    assert recorded["path"] == address
    assert recorded["shuffle_shards"] == 64
    assert "data.shuffle_shards=64, because data come from an object store" in caplog.text
    assert step_batch(tmp_path / "remote", 2, None, 1).data == address
    tokenizer = checkpoints.resolve(tmp_path / "remote").tokenizer
    assert tokenizer is not None
    assert (tokenizer / "tokenizer.json").is_file()
    # A copy on a disk continues the run, in the same order only.
    with pytest.raises(InputError, match=r"data.shuffle_shards: 64 -> 0"):
        train(values("remote"))
    assert len(train(values("remote", shuffle_shards=64))) == 4
