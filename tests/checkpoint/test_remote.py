"""Copies of checkpoints in an object store: a real S3 server, faults, and fetching them back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from megaconsa import incidents
from megaconsa.checkpoint import remote, store
from megaconsa.checkpoint.remote import Uploads, fetch, upload
from megaconsa.errors import DataError, InputError, UnreachableError
from megaconsa.object_store import connection
from megaconsa.reporting.metrics import computed
from tests.support.interruptions import RULE, CrashAfter, interrupted

MakeConfig = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket of a real S3 server on this machine."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # Connections keep the environment in which they were made.
    connection.cache_clear()
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket="runs")
    yield client
    server.stop()


def keys(bucket: Any) -> set[str]:
    found = bucket.list_objects_v2(Bucket="runs").get("Contents", [])
    return {entry["Key"] for entry in found}


def test_a_run_goes_on_from_the_copy_of_its_checkpoint(
    bucket: Any, make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    def config(name: str, **checkpoint: object) -> dict[str, Any]:
        return make_config(run={"dir": str(tmp_path / name)}, checkpoint=checkpoint)

    whole = train(config("whole"))
    run = tmp_path / "copied"
    interrupted(config("copied"), CrashAfter(5))
    values = config("copied", upload="s3://runs/one")
    copied = train(values)
    assert computed(copied) == computed(whole)
    files = {path.name for path in (run / "checkpoints" / "step_6").iterdir()}
    assert {key for key in keys(bucket) if "/step_6/" in key} == {
        f"one/step_6/{name}" for name in files
    }
    assert incidents.read(run) == []

    # A machine that has nothing but the store.
    elsewhere = tmp_path / "elsewhere"
    fetched = fetch("s3://runs/one/step_6", elsewhere)
    assert store.read(fetched).faults() == {}
    values = make_config(
        run={"dir": str(tmp_path / "next")}, model={"init_from": str(fetched)}, allocation=RULE
    )
    assert len(train(values)) == 6


def test_a_store_that_is_away_does_not_stop_the_run(
    bucket: Any, make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    values = make_config(checkpoint={"upload": "s3://no-such-bucket/one"})
    rows = train(values)
    assert rows[-1]["step"] == 6
    (incident, *_) = incidents.read(tmp_path / "run")
    assert incident["kind"] == "checkpoint"
    assert "its copy could not be written: s3://no-such-bucket/one/step_6" in incident["text"]
    assert not (tmp_path / "run" / "uploads.json").exists()


@pytest.fixture
def checkpoint(make_config: MakeConfig, train: Train, tmp_path: Path) -> Path:
    train(make_config(training={"steps": 2}, allocation=RULE))
    return tmp_path / "run" / "checkpoints" / "step_2"


def test_a_copy_is_read_back(
    bucket: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = remote._download

    def flipping(source: str, local: Path) -> None:
        download(source, local)
        content = bytearray(local.read_bytes())
        content[len(content) // 2] ^= 1
        local.write_bytes(content)

    monkeypatch.setattr(remote, "_download", flipping)
    with pytest.raises(DataError, match=r"s3://runs/one/step_2/.* does not match its checksum"):
        upload(checkpoint, "s3://runs/one")
    assert "one/step_2/manifest.json" not in keys(bucket)


def test_a_damaged_or_unfinished_copy_is_refused(
    bucket: Any, checkpoint: Path, tmp_path: Path
) -> None:
    upload(checkpoint, "s3://runs/one")
    key = "one/step_2/model.safetensors"
    content = bucket.get_object(Bucket="runs", Key=key)["Body"].read()
    bucket.put_object(Bucket="runs", Key=key, Body=content[:-9])
    with pytest.raises(DataError, match=r"model\.safetensors has \d+ bytes instead of"):
        fetch("s3://runs/one/step_2", tmp_path / "new")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    bucket.delete_object(Bucket="runs", Key="one/step_2/manifest.json")
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        fetch("s3://runs/one/step_2", tmp_path / "new")
    with pytest.raises(InputError, match="is no checkpoint"):
        fetch("s3://runs/one", tmp_path / "new")
    with pytest.raises(InputError, match="exists"):
        fetch("s3://runs/one/step_2", checkpoint.parent.parent)


def test_a_mounted_folder_is_a_store_too(checkpoint: Path, tmp_path: Path) -> None:
    upload(checkpoint, str(tmp_path / "mount"))
    fetched = fetch(str(tmp_path / "mount" / "step_2"), tmp_path / "new")
    assert store.read(fetched).faults() == {}
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(UnreachableError):
        remote._download(str(tmp_path / "mount" / "x"), tmp_path / "x")


def test_which_checkpoints_are_copied(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    for step in (4, 6, 8):
        shutil.copytree(checkpoint, checkpoint.with_name(f"step_{step}"))
    uploads = Uploads(run, "s3://runs/one")

    def pending() -> list[str]:
        return [path.name for path in uploads.pending(lambda path: path.name == "step_4")]

    assert pending() == ["step_4", "step_8"]
    uploads.add(checkpoint.with_name("step_8"))
    assert pending() == ["step_4"]
    manifest = checkpoint.with_name("step_8") / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content + " ")
    assert pending() == ["step_4", "step_8"]
    manifest.write_text(content)
    assert Uploads(run, "s3://runs/other").pending(lambda path: False) == [
        checkpoint.with_name("step_8")
    ]
