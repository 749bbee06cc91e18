"""Sources in an object store: the same data as from a disk, read by ranges."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from megaconsa.data import pieces, source_store
from megaconsa.data.dataset_info import INFO
from megaconsa.data.document import Vocabulary
from megaconsa.data.documents import Layout, read_documents
from megaconsa.data.pieces import cut, identity
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify
from megaconsa.data.sources import find_files
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError
from tests.data.test_prepare import contents
from tests.support.object_stores import BUCKET, ObjectStore
from tests.support.source_files import write_ids, write_mds, write_texts
from tests.support.texts import read_texts

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and reads that are smaller than the files."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(source_store, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(source_store, "REQUEST_BYTES", 7000)


@pytest.fixture(scope="module")
def texts(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "texts"
    write_texts(folder, documents)
    return folder


@pytest.fixture(scope="module")
def ids(
    documents: list[str], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "ids"
    write_ids(folder, Tokenizer.load(tokenizer_folder).encode_batch(documents))
    return folder


def prepared(sources: list[str], out: Path, tokenizer: Path, workers: int = 2) -> dict[str, str]:
    """Prepares data. Returns the hashes of the files, and what does not name the sources."""
    options = Options(sequence_length=32, validation_share=0.1, workers=workers, similarity=0.9)
    prepare(sources, out, options, tokenizer=tokenizer)
    assert verify(out) == []
    info = json.loads((out / INFO).read_text())
    del info["source"]["names"], info["source"]["files"]
    for source in info["sources"]:
        del source["name"]
    return {**contents(out), INFO: json.dumps(info)}


@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_a_folder_of_every_format(
    kind: str,
    request: pytest.FixtureRequest,
    store: ObjectStore,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    folder: Path = request.getfixturevalue(kind)
    address = store.upload(folder, f"mount/{kind}")
    # Web consoles leave such an object for a folder.
    store.client.put_object(Bucket=BUCKET, Key=f"mount/{kind}/deep/", Body=b"")
    expected = prepared([str(folder)], tmp_path / "local", tokenizer_folder, workers=1)
    assert prepared([address], tmp_path / "remote", tokenizer_folder) == expected
    here = find_files([str(folder)])
    there = find_files([address])
    assert [file.path.relative_to(folder).parts for file in here.files] == [
        file.path.parts[4:] for file in there.files
    ]
    assert [file.reason for file in here.skipped] == [file.reason for file in there.skipped]
    assert str(there.files[0].path).startswith(f"s3://bucket/mount/{kind}/")
    parts = [part for piece in cut(there.files) for part in piece.files]
    assert sum(part.end is not None for part in parts) > 3


def test_single_files_beside_local_ones(
    store: ObjectStore, texts: Path, ids: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    names = ["deep/lines.jsonl", "lines.jsonl.gz", "lines", "deep/er/table.parquet", "README.md"]
    ids_names = ["ids.bin", "ids.idx", "plain/index.json", "packed/index.json"]
    local = [f"{texts}/{name}" for name in names] + [f"{ids}/{name}" for name in ids_names]
    remote = [f"{store.upload(texts, 'single')}/{name}" for name in names]
    remote += [f"{store.upload(ids, 'ids')}/{name}" for name in ids_names]
    expected = prepared(local, tmp_path / "local", tokenizer_folder)
    assert prepared([local[0], *remote[1:]], tmp_path / "remote", tokenizer_folder) == expected


def test_a_whole_bucket_and_a_mounted_folder(
    store: ObjectStore, texts: Path, documents: list[str], tmp_path: Path
) -> None:
    store.client.create_bucket(Bucket="whole")
    for key in ("a.txt", "a.txt/b.txt", "./a.txt", "x//y.txt", ".z/c.txt"):
        store.client.put_object(Bucket="whole", Key=key, Body=key.encode())
    # Names that are no paths are not in a mount either.
    assert sorted(read_texts(find_files(["s3://whole"]).files)) == ["a.txt", "a.txt/b.txt"]
    mount = tmp_path / "s3:" / "bucket"
    mount.parent.mkdir()
    mount.symlink_to(texts)
    assert len(read_texts(find_files([str(mount)]).files)) > 7 * len(documents)


@pytest.mark.parametrize("name", ["deep/lines.jsonl", "deep/er/table.parquet"])
def test_parts_of_files_read_their_ranges(store: ObjectStore, texts: Path, name: str) -> None:
    address = store.upload(texts, "ranges")
    (file,) = find_files([f"{address}/{name}"]).files
    found = list(cut([file]))
    assert len(found) > 5
    store.sent.clear()
    assert 0 < len(read_texts(found[2].files)) < 60
    # The end of a Parquet file, which describes it, is read with each part (64 KiB).
    assert store.sent[file.path.name] < 0.4 * (texts / name).stat().st_size


def test_pieces_of_megatron_files_read_their_part_of_the_index(
    store: ObjectStore, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.upload(ids, "ranges")
    (file,) = find_files([f"{address}/ids.bin"]).files
    monkeypatch.setattr(source_store, "BUFFER_BYTES", 100)
    found = list(cut([file]))
    assert len(found) > 2
    store.sent.clear()
    read = read_documents(found[1].files, vocabulary=Vocabulary(512, 1))
    assert next(iter(read)).ids is not None
    assert 0 < store.sent["ids.idx"] < 0.6 * (ids / "ids.idx").stat().st_size


def test_an_index_of_shards_is_no_request_a_shard(store: ObjectStore, tmp_path: Path) -> None:
    rows = [{"text": f"text {number} " * 9} for number in range(40)]
    write_mds(tmp_path / "mds", {"text": "str"}, rows, size_limit=256)
    address = store.upload(tmp_path / "mds", "mds")
    store.requests = 0
    files = find_files([f"{address}/index.json"]).files
    assert len(files) > 15
    assert store.requests < 12
    assert len(read_texts(files)) == 40


def test_a_file_that_was_replaced_is_another(store: ObjectStore, texts: Path) -> None:
    address = store.upload(texts, "changed")
    before = identity(find_files([f"{address}/lines"]).files[0])
    again = identity(find_files([f"{address}/lines"]).files[0])
    store.change("changed/lines", lambda content: content + content)
    after = identity(find_files([f"{address}/lines"]).files[0])
    assert before == again != after
    assert before[0] == "s3://bucket/changed/lines"


def test_processes_read_at_the_same_time(store: ObjectStore, texts: Path) -> None:
    address = store.upload(texts, "forked")
    files = find_files([f"{address}/deep/lines.jsonl"]).files
    expected = read_texts(files)

    def read() -> None:
        assert read_texts(files) == expected

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_bad_line_is_named_by_its_address_and_place(store: ObjectStore, texts: Path) -> None:
    address = store.upload(texts, "bad")
    lines = (texts / "deep" / "lines.jsonl").read_bytes().splitlines(keepends=True)
    lines[200] = b"{\n"
    store.client.put_object(Bucket=BUCKET, Key="bad/deep/lines.jsonl", Body=b"".join(lines))
    found = list(cut(find_files([f"{address}/deep/lines.jsonl"]).files))
    with pytest.raises(InputError, match=r"^s3://bucket/bad/deep/lines.jsonl, line 201: expected"):
        [read_texts(piece.files) for piece in found]
    files = find_files([f"{address}/deep/er/table.parquet"]).files
    with pytest.raises(InputError, match=r"^s3://bucket/bad/.*parquet: it has no column \"x\" but"):
        read_texts(files, Layout("x"))
