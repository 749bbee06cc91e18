"""Faults while sources are read from a store: retried exactly, or ended with the address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from megaconsa import object_store, reading
from megaconsa.data import PIECES, pieces, source_store, tokenization
from megaconsa.data.documents import read_documents
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify
from megaconsa.data.sources import find_files
from megaconsa.errors import InputError, UnreachableError
from tests.data.test_prepare import contents
from tests.support import object_stores
from tests.support.object_stores import BUCKET, ObjectStore, answers, halves, hangs_up, stalls
from tests.support.source_files import write_texts
from tests.support.texts import read_texts

pytestmark = pytest.mark.usefixtures("impatient")
NAME = "lines.jsonl"
ATTEMPTS = 3
"""How often pyarrow asks by itself."""


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and reads that are smaller than the files."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(source_store, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(source_store, "REQUEST_BYTES", 7000)


@pytest.fixture
def texts(documents: list[str], tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts", documents[:100])
    return tmp_path / "texts"


@pytest.fixture
def address(store: ObjectStore, texts: Path, tmp_path: Path) -> str:
    return store.upload(texts, tmp_path.name)


def good(handler: object, body: bytes) -> bytes:
    return body


@pytest.mark.parametrize(
    "fault", [answers(500), answers(503), hangs_up, halves, stalls(1.5)], ids=lambda f: f.__name__
)
def test_a_store_that_fails_for_some_time(
    store: ObjectStore,
    address: str,
    texts: Path,
    fault: object_stores.Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 60.0)
    # More than pyarrow's own attempts.
    repeated = [fault] * (ATTEMPTS + 1)
    store.faults["*"] = list(repeated)
    files = find_files([address]).files
    assert not store.faults["*"]
    for name in (NAME, "table.parquet"):
        # The first ranges come, then one in the middle fails.
        store.faults[name] = [good] * 2 + repeated
    assert read_texts(files) == read_texts(find_files([str(texts)]).files)
    assert not any(store.faults.values())


@pytest.mark.parametrize("fault", [answers(503), hangs_up, halves], ids=lambda f: f.__name__)
def test_a_store_that_stays_away(
    store: ObjectStore,
    address: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    fault: object_stores.Fault,
) -> None:
    out = tmp_path / "out"
    options = Options(sequence_length=32, workers=2)
    store.faults[NAME] = [good] * 30 + [fault] * 1000
    with pytest.raises(
        UnreachableError, match=rf"^{address}/deep/{NAME} could not be read.*the same"
    ):
        prepare([address], out, options, tokenizer=tokenizer_folder)
    assert (out / PIECES).exists()
    store.faults["*"] = [fault] * 1000
    with pytest.raises(UnreachableError, match=rf"^{address} could not be read"):
        find_files([address])
    store.faults.clear()
    prepare([address], out, options, tokenizer=tokenizer_folder)
    prepare([address], tmp_path / "whole", options, tokenizer=tokenizer_folder)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_is_removed_or_cut_on_the_way(store: ObjectStore, address: str) -> None:
    files = find_files([f"{address}/deep/{NAME}"]).files
    documents = read_documents(files)
    next(documents)
    store.change(files[0].path.as_posix().partition("bucket/")[2], lambda content: content[:3000])
    with pytest.raises(InputError, match=rf"^{address}/deep/{NAME}: it was replaced while"):
        list(documents)
    store.client.delete_object(Bucket=BUCKET, Key=str(files[0].path).partition("bucket/")[2])
    with pytest.raises(InputError, match=rf"{NAME}: cannot be read \(No such file or directory\)"):
        read_texts(files)


def test_a_damaged_compressed_file(store: ObjectStore, address: str) -> None:
    name = "lines.jsonl.gz"
    key = f"{address}/{name}".partition("bucket/")[2]
    store.change(key, lambda content: content[:-9])
    with pytest.raises(InputError, match=rf"^{address}/{name}: the file is damaged"):
        read_texts(find_files([f"{address}/{name}"]).files)


@pytest.mark.parametrize("source", ["s3://bucket/gone", "s3://nowhere/x.txt", "s3://nowhere"])
def test_what_is_not_there(store: ObjectStore, source: str) -> None:
    with pytest.raises(InputError, match=rf"^source {source}: no such file or folder"):
        find_files([source])


def test_a_shard_of_an_index_that_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    shard = {"format": "mds", "column_names": [], "column_encodings": [], "zip_data": None}
    index = f'{{"shards": [{ {**shard, "raw_data": {"basename": "x.mds"}}!s}]}}'
    index = index.replace("'", '"').replace("None", "null")
    store.client.put_object(Bucket=BUCKET, Key="lonely/index.json", Body=index.encode())
    for source in ("s3://bucket/lonely", "s3://bucket/lonely/index.json"):
        with pytest.raises(InputError, match=r"^s3://bucket/lonely/x.mds: shard cannot be found"):
            find_files([source])


def test_refused_access_and_missing_credentials(
    store: ObjectStore, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.faults["*"] = [answers(403)] * 9
    with pytest.raises(InputError, match=rf"^{address}: access is refused, or credentials are"):
        find_files([address])
    store.faults.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    object_stores.store_connections.connect.cache_clear()
    with pytest.raises(InputError, match=rf"^{address}.*access is refused, or credentials are"):
        find_files([address])


def test_a_bucket_that_amazon_does_not_have(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(bucket: str) -> str:
        raise OSError(f"Bucket '{bucket}' not found")

    monkeypatch.delenv("S3_ENDPOINT_URL")
    monkeypatch.setattr(fs, "resolve_s3_region", missing)
    with pytest.raises(InputError, match=r"^s3://gone: there is no such bucket, name another$"):
        find_files(["s3://gone/x"])


@pytest.mark.parametrize(
    ("scheme", "package"),
    [
        ("s3", "pyarrow"),
        ("azure", "azure-storage-blob azure-identity"),
        ("hf", "huggingface_hub"),
    ],
)
def test_a_missing_package_is_named(
    scheme: str, package: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"s3": "pyarrow.fs", "azure": "azure.storage.blob", "hf": "huggingface_hub"}
    monkeypatch.setitem(sys.modules, modules[scheme], None)
    with pytest.raises(InputError, match=rf"{scheme}:// needs a package .* install {package}$"):
        find_files([f"{scheme}://datasets/owner/name"])


@pytest.mark.parametrize("scheme", ["http", "ftp", "file", "oci", "sftp", "azure-dl", "S3"])
def test_stores_that_cannot_hold_sources_are_refused(scheme: str) -> None:
    read = "files are read from a disk, s3://, gs://, azure://, hf://; copy those of"
    with pytest.raises(InputError, match=rf"^source {scheme}://host/x: {read} {scheme}:// to one"):
        find_files([f"{scheme}://host/x"])


def test_the_command_refuses_before_it_writes(store: ObjectStore, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megaconsa.cli", "prepare-data", "s3://bucket/gone"]
    command += ["--out", str(tmp_path / "out"), "--train-tokenizer", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: source s3://bucket/gone: no such file or folder, name")
    assert not (tmp_path / "out").exists()


KILLING = """
import os
from pathlib import Path
from megaconsa.data import pieces, source_store, tokenization
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
pieces.PIECE_BYTES = 20_000
tokenize = tokenization._tokenize_piece

def killing(folder, name):
    if len(list(folder.glob("*.json"))) >= 3:
        os.kill(os.getppid(), 9)
    return tokenize(folder, name)

tokenization._tokenize_piece = killing
options = Options(sequence_length=32, workers=2)
prepare([{address!r}], Path({out!r}), options, tokenizer=Path({tokenizer!r}))
"""


def test_the_same_command_continues_after_a_kill(
    store: ObjectStore,
    address: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    script = KILLING.format(address=address, out=str(out), tokenizer=str(tokenizer_folder))
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert killed.returncode == -9
    done = {file.stem for file in (out / PIECES).glob("*.json")}
    assert len(done) >= 3
    began: list[str] = []
    submit = tokenization._Pool.submit

    def counted(pool: tokenization._Pool, folder: Path, name: str) -> object:
        began.append(name)
        return submit(pool, folder, name)

    monkeypatch.setattr(tokenization._Pool, "submit", counted)
    options = Options(sequence_length=32, workers=2)
    prepare([address], out, options, tokenizer=tokenizer_folder)
    assert began
    assert done.isdisjoint(began)
    assert verify(out) == []
    prepare([address], tmp_path / "whole", options, tokenizer=tokenizer_folder)
    assert contents(out) == contents(tmp_path / "whole")
    # A finished folder is left as it is, and a changed file is noticed.
    prepare([address], out, options, tokenizer=tokenizer_folder)
    store.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/new.txt", Body=b"new")
    with pytest.raises(InputError, match="the source files are others, or have changed"):
        prepare([address], out, options, tokenizer=tokenizer_folder)
