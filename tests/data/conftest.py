"""A small data folder, made once. Tests that damage it take a copy."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaconsa.data import shards
from megaconsa.data.cache_settings import CacheSettings
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.tokenizer import train_sentencepiece
from tests.support.compressed_data import compress
from tests.support.object_stores import ObjectStore, object_store


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Random text of made-up words, numbers, indentation, and some non-ASCII characters."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choice("aeiouklmnprst") for _ in range(rng.randint(2, 9))) for _ in range(400)
    ]
    pieces = [*words, "\n", "\n    ", "\t", " ", "(x)", "1234", "größe", "naïve", "日本"]
    return [" ".join(rng.choice(pieces) for _ in range(rng.randint(5, 200))) for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def tokenizer_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(documents, folder, 512)
    return folder


@pytest.fixture(scope="session")
def text_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number, document in enumerate(documents):
        (folder / f"{number}.txt").write_text(document)
    return folder


@pytest.fixture(scope="session")
def prepared(
    text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data folder with some hundreds of sequences of 32 tokens.

    Shards are 4 KiB so that there are several of them.
    """
    folder = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 4096)
        info = prepare(
            [str(text_folder)],
            folder,
            Options(sequence_length=32, validation_share=0.1),
            tokenizer=tokenizer_folder,
        )
    assert info.splits["train"].sequences > 200
    assert len(list((folder / "train").glob("shard.*"))) > 5
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder. The test may damage it."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def compressed(prepared: Path, tmp_path: Path) -> Path:
    """The same data as version 1 of the format. The test may damage it."""
    return compress(prepared, tmp_path / "compressed", shard_bytes=4096)


@pytest.fixture(params=["flat", "compressed"])
def either(request: pytest.FixtureRequest) -> Path:
    """A folder of each version. The test may damage it."""
    folder: Path = request.getfixturevalue("copy" if request.param == "flat" else "compressed")
    return folder


@pytest.fixture(scope="session")
def info(prepared: Path) -> DatasetInfo:
    return DatasetInfo.load(prepared)


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
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


@pytest.fixture(scope="session")
def few_shards(
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


@pytest.fixture(scope="session")
def address(server: ObjectStore, few_shards: Path) -> Path:
    return Path(server.upload(few_shards, "data"))


@pytest.fixture
def own_address(store: ObjectStore, few_shards: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(store.upload(few_shards, tmp_path.name))
